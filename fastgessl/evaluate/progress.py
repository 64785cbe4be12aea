"""A progress bar that stays away from what is over before one would want it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import Progress

SECONDS_BEFORE_BAR = 2.0
Item = TypeVar("Item")


class LateProgress(Progress):
    """rich's progress bar on standard error, from two seconds after its start; nothing where that is no
    terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._begun = time.monotonic()
        super().__init__(console=console, transient=True, disable=not console.is_terminal)

    def get_renderables(self) -> Iterable[RenderableType]:
        return super().get_renderables() if time.monotonic() - self._begun > SECONDS_BEFORE_BAR else ()


def shown(items: Iterable[Item], description: str, progress: bool) -> Iterator[Item]:
    """The items one by one; with `progress`, under a bar that counts those whose work is done.

    >>> list(shown([1, 2], "features", progress=False))
    [1, 2]
    """
    if not progress:
        yield from items
        return
    with LateProgress() as bar:
        task = bar.add_task(description, total=len(items) if isinstance(items, Sized) else None)
        for item in items:
            yield item
            bar.advance(task)
