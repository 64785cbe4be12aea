"""The command in this process, and a tiny run trained by it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tiny_run import TINY


class Outcome(NamedTuple):
    """What a user sees of a command."""

    code: int
    out: str
    err: str


def in_this_process(arguments: Sequence[object], printed: Callable[[], tuple[str, str]]) -> Outcome:
    """Run `fastgessl ARGUMENTS`; `printed` then gives what came on standard output and error."""
    from fastgessl.cli import main

    forget_processes()
    code = 0
    try:
        main([str(word) for word in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        forget_processes()
    return Outcome(code, *printed())


def forget_processes() -> None:
    """Accelerate keeps its processes, device and precision for the life of the interpreter."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train_tiny(folder: Path, *options: str) -> Path:
    """Train into `folder` and return it; metrics, two checkpoints, weights and an evaluation are there
    afterwards.
    """
    steps = ("--train.batch_size", 128, "--train.max_steps", 18, "--train.checkpoint_every", 9)
    words = (*TINY, *steps, "--evaluate.every_epochs", 1, "--train.run_dir", folder, *options)
    assert in_this_process(["train", "digits-simclr-gessl", *words], lambda: ("", "")).code == 0
    return folder
