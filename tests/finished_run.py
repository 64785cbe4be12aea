"""A tiny run, trained in this process for tests that look at finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TINY


def train_tiny(folder: Path, *options: str, recipe: str = "digits-simclr-gessl") -> Path:
    """Train into `folder` and return it; metrics, two checkpoints, weights and an evaluation are there
    afterwards.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from fastgessl.cli import main

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    further = (
        "--evaluate.every_epochs",
        "1",
        "--train.checkpoint_every",
        "9",
        "--train.max_steps",
        "18",
        "--train.run_dir",
        str(folder),
    )
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, *TINY, "--train.batch_size", "128", *further, *options])
    assert stop.value.code == 0
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return folder
