"""Every digits recipe of the matrix takes a few real steps: each registered method, plain, under GeSSL's
presets, and regulated.
"""

from __future__ import annotations

import pytest
import torch

from fastgessl import pipelines
from fastgessl.build import build_loader, build_objective, make_plan
from fastgessl.config import Config
from fastgessl.distributed import build_accelerator
from fastgessl.methods import METHODS
from fastgessl.recipes import load, parts

STEPS = 2
GESSL = ["gessl", *(f"gessl-{preset}" for preset in parts("gessl") if preset != "fast")]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def tiny(config: Config) -> Config:
    """The recipe's own method, heads, losses and views, with a narrow encoder and few images a step."""
    sections = {
        "model": config.model.model_copy(update={"width": 0.125}),
        "train": config.train.model_copy(update={"batch_size": 32, "max_steps": STEPS}),
        "views": config.views.model_copy(update={"size": 8}),
    }
    return config.model_copy(update=sections)


def test_every_registered_method_has_a_recipe():
    assert set(parts("methods")) == set(METHODS)


@pytest.mark.parametrize("suffix", ["", *GESSL, "dsa", "dsa-gessl-head"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_digits_recipe_trains(method, suffix, tmp_path):
    if "dsa" in suffix and METHODS[method].needs_labels:
        pytest.skip("there is nothing to regulate where labels are known")
    config = tiny(load("-".join(filter(None, ["digits", method, suffix]))).config)
    accelerator = build_accelerator(config, tmp_path)
    images = pipelines.open_images("digits")
    loader = build_loader(config, images, accelerator)
    objective = build_objective(config, make_plan(config, images, loader, accelerator))
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    batches = iter(loader)
    for step in range(STEPS):
        batch = next(batches)
        result = objective(batch.views, step, labels=batch.label)
        result.loss.backward()
        assert result.loss.isfinite() and all(parameter.grad is not None for parameter in trained)
        assert ("sigma" in result.metrics) == ("gessl" in suffix and step % config.gessl.every == 0)
        optimizer.step()
        optimizer.zero_grad()
        objective.method.update_state([(result.outputs, result.targets)], step)
    loader.close()
    assert all(value.isfinite() for value in result.metrics.values())
