"""The command in this process, with fresh Accelerate state each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest


class Outcome(NamedTuple):
    """What a user sees of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def fastgessl(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run `fastgessl ARGUMENTS` in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from fastgessl.cli import main

    def run(*arguments: object) -> Outcome:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        code = 0
        try:
            main([str(word) for word in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
