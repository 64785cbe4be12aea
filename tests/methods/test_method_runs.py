"""Methods with a state in the real command: what a resumed run must find again, and what the loop does with
their parameters.
"""

import shutil

import pytest
import torch
from tiny_run import TINY, read_lines

from fastgessl.schedules import learning_rate, weight_decay

# Two steps fill the queues, which the third is the first to see; the centre and the teacher's temperature
# move at every step.
STATEFUL = {
    "moco": ("--method.moco.queue_length", 128),
    "swav": ("--method.swav.queue_length", 128, "--method.swav.queue_start_epoch", 0),
    "dino": (
        "--method.dino.teacher_temperature_start",
        0.02,
        "--method.dino.teacher_warmup_epochs",
        1,
        "--schedule.end_weight_decay",
        10,
    ),
}


def state_of(run, step):
    return torch.load(run / "checkpoints" / f"step-{step:09d}" / "state.pt", weights_only=True)


@pytest.mark.parametrize("method", STATEFUL)
def test_a_resumed_run_has_queue_centre_and_momentum_encoder_again_to_the_bit(fastgessl, tmp_path, method):
    options = ("train", f"digits-{method}", *TINY, "--train.max_steps", 6, *STATEFUL[method])
    options += ("--train.checkpoint_every", 1, "--train.keep_checkpoints", 9)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert fastgessl(*options, "--train.run_dir", whole).code == 0
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("encoder*", "evaluation*", "summary*"))
    for checkpoint in (resumed / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > 3:
            shutil.rmtree(checkpoint)
    assert (
        "continued from step-000000003"
        in fastgessl(*options, "--train.run_dir", resumed, "--train.resume", "auto").out
    )
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    first, last = (state_of(whole, step)["objective"] for step in (3, 6))
    again = state_of(resumed, 6)["objective"]
    assert all(torch.equal(value, again[name]) for name, value in last.items())
    moved = {name.split(".")[1] for name, value in last.items() if not torch.equal(value, first[name])}
    assert (
        moved
        >= {
            "moco": {"queue", "momentum_backbone"},
            "swav": {"queue", "prototypes"},
            "dino": {"center", "momentum_projector"},
        }[method]
    )


def test_the_loop_decays_by_the_schedule_and_clips_each_gradient(fastgessl, tmp_path):
    run = tmp_path / "run"
    options = (
        "--optim.name",
        "sgd",
        "--optim.momentum",
        0,
        "--optim.base_lr",
        0.5,
        "--optim.lr_scaling",
        "none",
    )
    options += (
        "--optim.weight_decay",
        0.01,
        "--schedule.end_weight_decay",
        10,
        "--schedule.warmup_epochs",
        0,
    )
    options += (
        "--optim.clip_gradient_each",
        1e-3,
        "--train.checkpoint_every",
        1,
        "--train.keep_checkpoints",
        9,
    )
    assert (
        fastgessl(
            "train", "digits-simclr", *TINY, "--train.max_steps", 4, *options, "--train.run_dir", run
        ).code
        == 0
    )
    states = {step: state_of(run, step) for step in (1, 2, 3)}
    rates, decays = learning_rate(0.5, 4), weight_decay(0.01, 4, end=10)
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
