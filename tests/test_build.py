"""What follows from a configuration: steps, and batch statistics."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from reliability.small_training import small_config, start

from fastgessl import build, pipelines
from fastgessl.config import MocoConfig, UsageError
from fastgessl.recipes import load


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "images.npz", train_x=np.zeros((184, 8, 8, 3), dtype=np.uint8))
    return tmp_path / "images.npz"


def test_epochs_of_a_broken_number_of_steps_end_with_the_last_whole_step(data, tmp_path):
    # 23 batches of 8 an epoch, ten of them a step: 1,150 batches in 50 epochs.
    train = {"batch_size": 80, "accumulate": 10, "epochs": 50, "max_steps": None}
    plan = start(small_config(data, train=train), tmp_path).plan
    assert (plan.total_steps, plan.steps_per_epoch) == (115, 2.3)


@pytest.mark.parametrize(
    ("recipe", "shuffles", "asked", "planned"),
    [
        ("digits-moco", False, "auto", "synchronised"),
        ("digits-moco", True, "auto", "local"),
        ("digits-moco", True, "local", "local"),
        ("digits-moco-gessl", False, "auto", "local"),
        ("digits-moco", True, "synchronised", None),
    ],
)
def test_keys_that_are_dealt_out_among_ranks_keep_statistics_of_their_own(
    data, recipe, shuffles, asked, planned
):
    base = load(recipe).config
    method, model = (
        base.method.model_copy(update={"moco": MocoConfig(shuffle_batch_norm=shuffles)}),
        base.model.model_copy(update={"batch_norm": asked}),
    )
    config = base.model_copy(update={"method": method, "model": model})
    two = SimpleNamespace(num_processes=2, device="cpu", mixed_precision="no")
    images = pipelines.open_images("npz", data)
    if planned is None:
        with pytest.raises(UsageError, match=r"there is nothing to hide\. Leave out one of the two"):
            build.make_plan(config, images, range(10), two)
    else:
        assert build.make_plan(config, images, range(10), two).batch_norm == planned
