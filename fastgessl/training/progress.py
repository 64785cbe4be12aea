"""What a person sees while a run trains: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgessl.build import Plan
from fastgessl.config import Config

# A log file gets one line in so many seconds: enough to see life, few enough to read. Over days fewer: 2,000
# lines a week.
_SECONDS_BETWEEN_LINES = (20.0, 300.0)
_NAMES = {"loss": "loss", "sigma": "σ", "delta_loss": "ΔL"}


class TrainingProgress:
    """Loss, σ, ΔL, images/s and time left, on standard error. Silent if not enabled (all ranks but the
    first).
    """

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
        shown = (
            "  ".join(f"{_NAMES[name]} {value:.4g}" for name, value in self._seen.items())
            + f"  {images_per_second:,.0f} images/s"
        )
        self._bar.update(self._task, completed=step, metrics=shown)
        now = time.perf_counter()
        shortest, longest = _SECONDS_BETWEEN_LINES
        pause = min(max(shortest, (now - self._started) / 100), longest)
        if self._bar.disable and (now - self._last_line > pause or step == self._total):
            self._last_line = now
            left = (now - self._started) / (step - self._first) * (self._total - step)
            print(f"step {step} of {self._total}  {shown}  {left:.0f} s left", file=sys.stderr, flush=True)


def opening_lines(config: Config, plan: Plan, run: Path, resumed: Path | None) -> str:
    """What is about to happen, with every number that was derived rather than configured."""
    batch, optim = config.train.batch_size, config.optim
    per_rank = plan.images_per_forward // plan.world_size
    scaling = f"base {optim.base_lr:g} x {batch} / 256" if optim.lr_scaling == "linear" else "not scaled"
    chunks = f", in chunks of {config.train.gradient_cache}" if config.train.gradient_cache else ""
    sharding = ", FSDP" if config.train.sharding == "fsdp" else ""
    return (
        f"{config.recipe}: {plan.images} images, {plan.total_steps} steps of {batch} images "
        f"({plan.steps_per_epoch:g} an epoch)\n"
        f"  processes      {plan.world_size}, each {per_rank} images a forward pass x "
        f"{config.train.accumulate}{chunks}, "
        f"{plan.precision} ({plan.precision_reason}){sharding}\n"
        f"  learning rate  {plan.peak_learning_rate:g} ({scaling}), {optim.name}\n"
        f"  views          engine {plan.engine}: {plan.engine_reason}\n"
        f"  objective      {_objective_line(config)}; batch norm {plan.batch_norm}, negatives "
        f"{plan.negatives}\n"
        f"  folder         {run}" + (f", continued from {resumed.name}" if resumed else "")
    )


def _objective_line(config: Config) -> str:
    gessl = config.gessl
    if gessl.w_sigma == 0:
        return f"{config.method.name}, plain"
    alpha = (
        f"{gessl.inner_lr:g}"
        + {"constant": "", "cosine": " (cosine)", "times_lr": " x learning rate"}[gessl.inner_lr_schedule]
    )
    return (
        f"GeSSL over {config.method.name}: K {gessl.inner_steps}, lambda {gessl.target_steps}, alpha "
        f"{alpha}, "
        f"{gessl.hypergradient}, scope {gessl.scope}, sigma on every {gessl.every}. step with weight "
        f"{gessl.w_sigma:g}"
    )
