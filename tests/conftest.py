"""The command in this process, with fresh Accelerate state each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from finished_run import train_tiny


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


@pytest.fixture
def fastgessl(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run `fastgessl ARGUMENTS` in this process."""
    yield lambda *arguments: in_this_process(arguments, capsys.readouterr)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A finished run, shared: copy it before writing into it."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run")
