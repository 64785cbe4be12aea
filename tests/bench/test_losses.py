"""Whoever is compared computes the same loss."""

import pytest
import torch

from bench.test_losses import CONTENDERS, OURS, obstacle, one_pass, pair


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (loss, other)
        for loss, who in CONTENDERS.items()
        for other in who
        if other not in (OURS, "torch.compile")
    ],
)
def test_a_contender_computes_the_same_loss_and_gradients(loss, other):
    if reason := obstacle(other, "backward", 20, 400, "cpu"):
        pytest.skip(reason)
    operands = pair(20, "cpu", torch.float32)
    tolerance = 5e-2 if "autocast" in loss else 1e-5
    for pass_ in ("forward", "backward"):
        ours, theirs = (one_pass(pass_, CONTENDERS[loss][name], *operands) for name in (OURS, other))
        for found, expected in zip(ours, theirs, strict=True):
            assert (found.float() - expected.float()).norm() <= tolerance * expected.norm()


def test_what_is_left_out_says_why():
    assert "second derivative" in obstacle("torch.compile", "double backward", 1024, 1024**2, "cpu")
    assert "GiB" in obstacle("dense", "backward", 1 << 20, 1 << 40, "cpu")
    assert obstacle(OURS, "backward", 4096, 4096**2, "cpu") is None
