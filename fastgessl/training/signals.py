"""Ctrl-C, SIGTERM and SIGUSR1 as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once a signal has come. The second one acts as if nobody listened, so that a hanging step can
    still be killed.

    >>> import os, signal
    >>> with StopRequest() as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     (bool(stop), stop.name, stop.exit_code)
    (True, 'SIGTERM', 143)
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        for other, handler in self._previous.items():
            signal.signal(other, handler)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self._received is not None

    @property
    def name(self) -> str:
        """The signal's name; 'another process' if this rank only heard of it."""
        return self._received.name if self._received else "another process"

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count; SIGTERM's if this rank only heard of it."""
        return 128 + (self._received or signal.SIGTERM)
