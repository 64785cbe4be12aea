"""Writes metrics.jsonl, timing.jsonl and trackers, and shows progress; the only place where a step waits for
the device.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgessl import runs
from fastgessl.build import Plan
from fastgessl.config import Config
from fastgessl.objective import Result
from fastgessl.training.health import Reading, shape_of
from fastgessl.training.signals import StopRequest
from fastgessl.training.state import Training

# Lines of metrics.jsonl of a run of any length if log.every is left open; 100,000 of 250 bytes are 25 MB.
_LINES = 100_000
# Without a terminal standard error gets a line in this many seconds: enough to see life, few enough to read.
# Over days fewer: 2,000 lines a week.
_SECONDS_BETWEEN_LINES = (20.0, 300.0)
_SHOWN = {"loss": "loss", "sigma": "σ", "delta_loss": "ΔL"}


class MetricsLog:
    """Reads a step's numbers in one transfer, writes them down and shows them."""

    def __init__(self, training: Training, run: Path) -> None:
        self._training = training
        first, total = training.step, training.plan.total_steps
        self.every = training.config.log.every or math.ceil(total / _LINES)
        main = training.accelerator.is_main_process
        self._metrics = runs.JsonLines(run / "metrics.jsonl", first + 1, enabled=main)
        self._timing = runs.JsonLines(run / "timing.jsonl", first + 1, enabled=main)
        self._first_step = self._since_step = first
        self._started = self._since = self._last_line = time.perf_counter()
        self._seen: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not (main and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("training", total=total, completed=first, metrics="")

    def __enter__(self) -> "MetricsLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._metrics.close()
        self._timing.close()

    def read(self, results: Sequence[Result], stop: StopRequest, *, due: bool) -> Reading:
        """The gradient's norm, and if the step is to be logged, its metrics. Collective if due; one wait for
        the device in any case.
        """
        training = self._training
        norm = training.gradient_norm()
        asked = stop.received is not None
        if not due:
            return Reading(norm.item(), {}, asked and training.plan.world_size == 1)
        names = ["loss", *sorted(results[0].metrics), "spread", "directions"]
        rows = []
        for result in results:
            own = [result.loss, *(result.metrics[name] for name in names[1:-2])]
            measured = torch.stack([value.detach().float() for value in own])
            rows.append(torch.cat([measured, shape_of(result.outputs.projections)]))
        values = torch.cat([torch.stack(rows).mean(0), norm.new_full((1,), float(asked))])
        means = training.accelerator.reduce(values, "mean")
        *numbers, stopping, gradient_norm = torch.cat([means, norm[None]]).tolist()
        return Reading(gradient_norm, dict(zip(names, numbers, strict=True)), stopping > 0)

    def write(self, reading: Reading, *, skipped: bool) -> None:
        """Log the step that `training.step` has just counted, if it was read in full or skipped."""
        training, step = self._training, self._training.step
        if not reading.metrics and not skipped:
            return
        metrics: dict[str, Any] = reading.metrics | {"gradient_norm": reading.gradient_norm}
        if skipped:
            metrics = {name: metrics[name] for name in metrics if name not in ("spread", "directions")}
            metrics["skipped"] = training.skipped
        now = time.perf_counter()
        throughput = (step - self._since_step) * training.config.train.batch_size / (now - self._since)
        timing = {"step": step, "seconds": now - self._since, "images_per_second": throughput}
        self._since, self._since_step = now, step
        self._show(metrics, f"{throughput:,.0f} images/s", now)
        place = {
            "epoch": step / training.plan.steps_per_epoch,
            "lr": training.optimizer.param_groups[0]["lr"],
        }
        self._metrics.write({"step": step} | place | metrics)
        self._timing.write(timing)
        self._track(metrics | place)

    def note(self, values: dict[str, Any]) -> None:
        """Log what was measured between two steps, such as k-NN accuracy. `values` may be empty, when the
        data have no labels.
        """
        if values:
            self._metrics.write({"step": self._training.step} | values)
            self._track(values)
        self._since, self._since_step = time.perf_counter(), self._training.step

    def _track(self, values: dict[str, Any]) -> None:
        accelerator = self._training.accelerator
        with runs.writing(Path(accelerator.project_dir)):
            accelerator.log(values, step=self._training.step)

    def _show(self, metrics: Mapping[str, float], throughput: str, now: float) -> None:
        """σ and ΔL stay on display through the steps that do not measure them."""
        training = self._training
        self._seen |= {name: value for name, value in metrics.items() if name in _SHOWN}
        words = [f"{_SHOWN[name]} {value:.4g}" for name, value in self._seen.items()]
        shown = "  ".join([*words, throughput])
        self._bar.update(self._task, completed=training.step, metrics=shown)
        if not self._bar.disable or not training.accelerator.is_main_process:
            return
        shortest, longest = _SECONDS_BETWEEN_LINES
        pause = min(max(shortest, (now - self._started) / 100), longest)
        total = training.plan.total_steps
        if now - self._last_line > pause or training.step == total:
            self._last_line = now
            rate = (now - self._started) / (training.step - self._first_step)
            left = rate * (total - training.step)
            line = f"step {training.step} of {total}  {shown}  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)


def opening_lines(config: Config, plan: Plan, run: Path, resumed: Path | None) -> str:
    """What is about to happen, with every number that was derived rather than configured."""
    batch, optim = config.train.batch_size, config.optim
    per_rank = plan.images_per_forward // plan.world_size
    scaling = f"base {optim.base_lr:g} x {batch} / 256" if optim.lr_scaling == "linear" else "not scaled"
    chunks = f", in chunks of {config.train.gradient_cache}" if config.train.gradient_cache else ""
    sharding = ", FSDP" if config.train.sharding == "fsdp" else ""
    continued = f", continued from {resumed.name}" if resumed else ""
    gessl = config.gessl
    schedule = {"constant": "", "cosine": " (cosine)", "times_lr": " x learning rate"}
    bi_level = (
        f"GeSSL over {config.method.name}: K {gessl.inner_steps}, lambda {gessl.target_steps}, alpha "
        f"{gessl.inner_lr:g}{schedule[gessl.inner_lr_schedule]}, {gessl.hypergradient}, scope {gessl.scope}, "
        f"sigma on every {gessl.every}. step with weight {gessl.w_sigma:g}"
    )
    objective = bi_level if gessl.w_sigma else f"{config.method.name}, plain"
    return (
        f"{config.recipe}: {plan.images} images, {plan.total_steps} steps of {batch} images "
        f"({plan.steps_per_epoch:g} per epoch)\n"
        f"  processes      {plan.world_size}, each {per_rank} images per forward pass x "
        f"{config.train.accumulate}{chunks}, {plan.precision} ({plan.precision_reason}){sharding}\n"
        f"  learning rate  {plan.peak_learning_rate:g} ({scaling}), {optim.name}\n"
        f"  views          engine {plan.engine}: {plan.engine_reason}\n"
        f"  objective      {objective}; batch norm {plan.batch_norm}, negatives "
        f"{plan.negatives}\n"
        f"  folder         {run}{continued}"
    )
