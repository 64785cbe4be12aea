"""What a person sees while a run trains: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# A log file gets one line in this many seconds: enough to see life, few enough to read.
_SECONDS_BETWEEN_LINES = 20.0
_NAMES = {"loss": "loss", "sigma": "σ", "delta_loss": "ΔL"}


class TrainingProgress:
    """Loss, σ, ΔL, images/s and time left, on standard error. Silent if not enabled (all ranks but the first)."""

    def __init__(self, total_steps: int, first_step: int, *, enabled: bool) -> None:
        self._total, self._first = total_steps, first_step
        self._enabled, self._started = enabled, time.perf_counter()
        self._last_line = self._started
        self._seen: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[metrics]}"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True, disable=not (enabled and sys.stderr.isatty()),
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step, metrics="")

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float], images_per_second: float) -> None:
        """Show finished step `step`; σ and ΔL stay on display through the steps that do not measure them."""
        if not self._enabled:
            return
        self._seen |= {name: value for name, value in metrics.items() if name in _NAMES}
        shown = "  ".join(f"{_NAMES[name]} {value:.4g}" for name, value in self._seen.items()) + f"  {images_per_second:,.0f} images/s"
        self._bar.update(self._task, completed=step, metrics=shown)
        now = time.perf_counter()
        if self._bar.disable and (now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = now
            left = (now - self._started) / (step - self._first) * (self._total - step)
            print(f"step {step} of {self._total}  {shown}  {left:.0f} s left", file=sys.stderr, flush=True)
