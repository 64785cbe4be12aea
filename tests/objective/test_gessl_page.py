"""The examples of docs/gessl.md train, and the methods that they bring get the right gradient."""

import re
from pathlib import Path

import pytest
import torch
from smooth_toys import assert_slopes_agree

from fastgessl.config import GesslConfig, UsageError
from fastgessl.objective import GeSSL, measure_sigma

PAGE = Path(__file__).parents[2] / "docs" / "gessl.md"
DROPOUT_SEED = 7


@pytest.fixture(scope="module")
def page():
    """The names that the page's Python leaves behind."""
    scope = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, PAGE.name, "exec"), scope)
    return scope


def example(page, name):
    """A method of the page in float64, freshly started, and a batch for it."""
    torch.manual_seed(0)
    if name == "masked autoencoder":
        return page["MaskedAutoencoder"](8).double(), [
            page["patches"][:12].double(),
            torch.rand(12, 16) < 0.6,
        ]
    return page["SimCSE"](len(page["number"]) + 1, 8).double(), [page["tokens"][:12]]


every_example = pytest.mark.parametrize("name", ["masked autoencoder", "SimCSE"])


def test_the_loop_of_ones_own_trains_and_measures(page):
    history = page["history"]
    assert [sorted(metrics) for metrics in history] == [["delta_loss", "loss_ssl", "sigma"]] * 6
    assert history[-1]["loss_ssl"] < history[0]["loss_ssl"]
    assert page["sigma"] > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in page["one_way"].parameters())


def test_the_masked_autoencoder_and_simcse_learn(page):
    # The best that one patch can do for all of them is their mean, at the price of their variance.
    blind = page["patches"].flatten(0, 1).var(0, correction=0).mean().item()
    assert sum(page["rebuilding"][-8:]) / 8 < 0.8 * blind < page["rebuilding"][0]
    assert page["retrieval"][-1] < 0.5 * page["retrieval"][0]


def draw_the_same_units_at_every_forward(literal):
    outputs = literal.outputs

    def seeded(weights, views):
        torch.manual_seed(DROPOUT_SEED)
        return outputs(weights, views)

    literal.outputs = seeded


@every_example
@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("inner_steps", [0, 1, 2])
def test_a_method_outside_contrastive_vision_gets_the_gradient_of_central_differences(
    toys, page, name, scope, inner_steps
):
    method, views = example(page, name)
    settings = GesslConfig(
        inner_steps=inner_steps, inner_lr=0.05, inner_momentum=0.5, scope=scope, w_ssl=0.0, w_sigma=1.0
    )
    literal = toys.Literal(method, settings, views)
    draw_the_same_units_at_every_forward(literal)
    torch.manual_seed(DROPOUT_SEED)
    result = GeSSL(method, settings)(views)
    result.loss.backward()
    gradient = toys.gradients(method)
    unmoved = literal.sigma(torch.zeros_like(gradient))
    assert result.metrics["sigma"].item() == pytest.approx(unmoved, rel=1e-8)
    assert_slopes_agree(gradient, literal, directions=3)


@every_example
def test_another_number_of_views_is_refused(page, name):
    method, views = example(page, name)
    with pytest.raises(UsageError, match="view"):
        GeSSL(method, GesslConfig())([*views, views[0]])
    assert measure_sigma(method, GesslConfig(inner_lr=0.1), views) > 0
