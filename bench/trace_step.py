"""How far one reads to follow a step: the project's files and functions that it visits.

`python -m bench.trace_step` trains digits-simclr and prints two rows: the way from the command to the first
step, and the third step. A change of file is a call into another file than the call before it.
"""

import contextlib
import functools
import io
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastgessl.cli import main

ROOT = Path(__file__).resolve().parents[1]
ROOMS = tuple(f"{ROOT / room}/" for room in ("fastgessl", "kernels", "pipelines"))
OPTIONS = (
    "--views.size 8 --model.width 0.125 --train.batch_size 64 --train.max_steps 4 --train.device cpu "
    "--evaluate.tasks knn --log.trackers"
)


class Call(NamedTuple):
    """A call of one of the project's functions."""

    file: str
    function: str


class Walk(NamedTuple):
    """What was visited."""

    calls: int
    functions: int
    files: int
    changes: int


def walk(calls: Sequence[Call]) -> Walk:
    """Counts over calls in their order.

    >>> walk([Call("a.py", "f"), Call("b.py", "g"), Call("b.py", "g"), Call("a.py", "f")])
    Walk(calls=4, functions=2, files=2, changes=2)
    """
    changes = sum(before.file != after.file for before, after in itertools.pairwise(calls))
    return Walk(len(calls), len(set(calls)), len({call.file for call in calls}), changes)


@functools.cache
def place(file: str) -> str:
    """Where a file really is: kernels and pipelines are reached through links."""
    return str(Path(file).resolve())


def importing(frame: FrameType) -> bool:
    """Whether the call comes from a module of the project that is being imported, such as a decorator's."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_name == "<module>" and place(caller.f_code.co_filename).startswith(ROOMS):
            return True
        caller = caller.f_back
    return False


@contextlib.contextmanager
def recorded(calls: list[Call]) -> Iterator[None]:
    """Inside, every call of the project's functions in this thread is added; imports are not calls."""

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name.startswith("<"):
            return
        if (file := place(frame.f_code.co_filename)).startswith(ROOMS) and not importing(frame):
            calls.append(Call(file, frame.f_code.co_qualname))

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)


def trace(recipe: str = "digits-simclr") -> tuple[list[Call], list[Call]]:
    """(calls from the command to the first step, calls of the third step)."""
    calls: list[Call] = []
    steps: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(len(calls)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = ["train", recipe, *OPTIONS.split(), "--train.run_dir", str(Path(folder) / "run")]
        with recorded(calls), contextlib.suppress(SystemExit):
            main(words)
    hook.remove()
    first = next(number for number, call in enumerate(calls) if call.function == "Loader.__iter__")
    return calls[:first], calls[steps[1] : steps[2]]


def print_walks() -> None:
    """Both ways as a table."""
    table = Table()
    for column in ("", *Walk._fields):
        table.add_column(column)
    for title, calls in zip(("command to first step", "third step"), trace(), strict=True):
        table.add_row(title, *(str(count) for count in walk(calls)))
    Console().print(table)


if __name__ == "__main__":
    print_walks()
