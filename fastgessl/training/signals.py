"""Ctrl-C, SIGTERM and SIGUSR1 as a request that the loop answers between two steps."""

import signal
from types import FrameType

# Windows has no SIGUSR1.
_SIGNALS: list[signal.Signals] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class StopRequest:
    """`received` is the signal that has come. A second one acts as if nobody listened, so that a hanging step
    can still be killed.

    >>> import os
    >>> with StopRequest() as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     (stop.received is not None, stop.name, stop.exit_code)
    (True, 'SIGTERM', 143)
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()  # the next one finds the handlers of before

    @property
    def name(self) -> str:
        """The signal's name; 'another process' if this rank only heard of it."""
        return self.received.name if self.received else "another process"

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count; SIGTERM's if this rank only heard of it."""
        return 128 + (self.received or signal.SIGTERM)
