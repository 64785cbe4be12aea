"""The trainer gives each step its α, and the metrics say which."""

import math

import pytest
from tiny_run import TINY, read_lines


@pytest.mark.parametrize("schedule", ["cosine", "times_lr"])
def test_a_run_takes_its_alpha_from_the_schedule(fastgessl, tmp_path, schedule):
    run = tmp_path / "run"
    options = (
        "--gessl.inner_lr",
        0.2,
        "--gessl.inner_lr_schedule",
        schedule,
        "--gessl.every",
        1,
        "--train.run_dir",
        run,
    )
    outcome = fastgessl("train", "digits-simclr-gessl", *TINY, *options)
    assert (
        outcome.code == 0
        and {"cosine": "alpha 0.2 (cosine)", "times_lr": "alpha 0.2 x learning rate"}[schedule] in outcome.out
    )
    lines = read_lines(run / "metrics.jsonl")
    expected = {
        "cosine": [0.1 * (1 + math.cos(math.pi * step / len(lines))) for step in range(len(lines))],
        "times_lr": [0.2 * line["lr"] for line in lines],
    }[schedule]
    assert [line["inner_lr"] for line in lines] == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) > 1
