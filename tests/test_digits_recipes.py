"""Every digits recipe of the matrix takes a few real steps: each registered method, plain, under GeSSL's
presets, and regulated.
"""

import math

import pytest
from small_training import run_steps, start
from tiny_run import read_lines

from fastgessl.config import Config
from fastgessl.methods import METHODS
from fastgessl.recipes import load, parts

GESSL = ["gessl", *(f"gessl-{preset}" for preset in parts("gessl") if preset != "fast")]


def tiny(config: Config) -> Config:
    """The recipe's own method, heads, losses and views, with a narrow encoder and few images a step."""
    sections = {
        "model": config.model.model_copy(update={"width": 0.125}),
        "train": config.train.model_copy(update={"batch_size": 32, "max_steps": 2}),
        "views": config.views.model_copy(update={"size": 8}),
        "log": config.log.model_copy(update={"every": 1, "trackers": ()}),
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
    training = start(config, tmp_path)
    run_steps(training, tmp_path)
    lines = read_lines(tmp_path / "metrics.jsonl")
    measured = ["gessl" in suffix and step % config.gessl.every == 0 for step in range(2)]
    assert [line.get("sigma") is not None for line in lines] == measured
    assert all(math.isfinite(value) for line in lines for value in line.values())
