"""The examples of docs/gessl.md train, and the methods that they bring get the right gradient."""

import re
from pathlib import Path

import pytest
import torch

from fastgessl.config import GesslConfig, UsageError
from fastgessl.objective import GeSSL, measure_sigma
from fastgessl.objective.sigma import sigma

PAGE = Path(__file__).parents[2] / "docs" / "gessl.md"
RADIUS, DROPOUT_SEED = 1e-5, 7


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
    weights = {key: weight.detach().clone() for key, weight in toys.trainable(method).items()}
    log_target = literal.log_pi(literal.target(weights))

    def sigma_at(offset, direction):
        return literal.kl(
            log_target,
            literal.log_pi(literal.student({k: w + offset * direction[k] for k, w in weights.items()})),
        ).item()

    torch.manual_seed(DROPOUT_SEED)
    result = GeSSL(method, settings)(views)
    result.loss.backward()
    assert result.metrics["sigma"].item() == pytest.approx(sigma_at(0.0, weights), rel=1e-8)
    slopes = {
        key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in toys.trainable(method).items()
    }
    size = toys.gradients(method).norm().item()
    for seed in range(3):
        torch.manual_seed(seed)
        direction = {key: torch.randn_like(weight) for key, weight in weights.items()}
        length = sum(d.square().sum() for d in direction.values()).sqrt()
        direction = {key: d / length for key, d in direction.items()}
        expected = (sigma_at(RADIUS, direction) - sigma_at(-RADIUS, direction)) / (2 * RADIUS)
        found = sum((slopes[key] * direction[key]).sum() for key in direction).item()
        assert abs(found - expected) <= 1e-5 * max(abs(expected), size / len(toys.gradients(method)) ** 0.5)


@every_example
def test_another_number_of_views_is_refused(page, name):
    method, views = example(page, name)
    with pytest.raises(UsageError, match="view"):
        GeSSL(method, GesslConfig())([*views, views[0]])
    assert measure_sigma(method, GesslConfig(inner_lr=0.1), views) > 0


def test_pi_of_plain_logits_is_their_softmax(page):
    logits = torch.randn(6, 9, dtype=torch.float64)
    teacher = torch.randn(6, 9, dtype=torch.float64)
    found = sigma(
        *([page["Similarity"](rows, torch.eye(9, dtype=torch.float64), 1.0)] for rows in (logits, teacher))
    )
    expected = torch.nn.functional.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
