"""What the loop does with a method's parameters, in the real command."""

import pytest
import torch
from tiny_run import TINY, read_lines

from fastgessl.schedules import half_cosine, learning_rate


def state_of(run, step):
    return torch.load(run / "checkpoints" / f"step-{step:09d}" / "state.pt", weights_only=True)


def test_the_loop_decays_by_the_schedule_and_clips_each_gradient(fastgessl, tmp_path):
    run = tmp_path / "run"
    options = "--optim.name sgd --optim.momentum 0 --optim.base_lr 0.5 --optim.lr_scaling none "
    options += "--optim.weight_decay 0.01 --optim.clip_gradient_each 1e-3 --schedule.end_weight_decay 10 "
    options += "--schedule.warmup_epochs 0 --train.checkpoint_every 1 --train.keep_checkpoints 9"
    outcome = fastgessl("train", "digits-simclr", *TINY, *options.split(), "--train.run_dir", run)
    assert outcome.code == 0
    states = {step: state_of(run, step) for step in (1, 2, 3)}
    rates, decays = learning_rate(0.5, 4), half_cosine(0.01, 0.1, 4)
    for step in (2, 3):
        groups = states[step]["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [pytest.approx(decays[step - 1]), 0.0]
        before, after = (states[s]["objective"] for s in (step - 1, step))
        for name in ("method.backbone.conv1.weight", "method.projector.0.weight"):
            pull = (before[name] - after[name]) / rates[step - 1] - decays[step - 1] * before[name]
            assert pull.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert all(line["gradient_norm"] > 1e-2 for line in read_lines(run / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("method", "still"), [("swav", "method.prototypes"), ("dino", "method.last_layer.weight")]
)
def test_the_loop_leaves_a_frozen_last_layer_alone_for_its_epochs(fastgessl, tmp_path, method, still):
    run = tmp_path / "run"
    # 19 steps are an epoch of 64 images: 0.1 epochs are two steps.
    options = (f"--method.{method}.freeze_epochs", 0.1)
    options += ("--train.checkpoint_every", 1, "--train.keep_checkpoints", 9)
    assert fastgessl("train", f"digits-{method}", *TINY, *options, "--train.run_dir", run).code == 0
    first, second, fourth = (state_of(run, step)["objective"][still] for step in (1, 2, 4))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert (fourth - second).abs().max() > 1e-4
