"""metrics.jsonl, timing.jsonl, trackers and the progress bar; the only place where a step waits for the
device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgessl import runs
from fastgessl.objective import Result
from fastgessl.training.health import Symptoms
from fastgessl.training.progress import TrainingProgress
from fastgessl.training.signals import StopRequest
from fastgessl.training.state import Training

# Lines of metrics.jsonl of a run of any length if log.every is left open; 100,000 of 250 bytes are 25 MB.
_LINES = 100_000


@dataclass(frozen=True)
class Reading:
    """What the host learns of a step before the optimiser moves."""

    gradient_norm: float
    metrics: dict[str, float]
    """Means over ranks and micro-batches; empty if the step is not logged."""
    signs: dict[str, float]
    """What `Symptoms` measured; empty if the step is not logged."""
    stopping: bool
    """Whether some rank was asked to stop."""


class MetricsLog:
    """Reads a step's numbers in one transfer and writes them down."""

    def __init__(self, training: Training, run: Path, first_step: int) -> None:
        self._training, self._symptoms = training, Symptoms(training)
        main = training.accelerator.is_main_process
        self._metrics = runs.JsonLines(run / "metrics.jsonl", first_step + 1, enabled=main)
        self._timing = runs.JsonLines(run / "timing.jsonl", first_step + 1, enabled=main)
        self._progress = TrainingProgress(training.plan.total_steps, first_step, enabled=main)
        self._since, self._since_step = time.perf_counter(), first_step
        self.every = training.config.log.every or math.ceil(training.plan.total_steps / _LINES)

    def __enter__(self) -> MetricsLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._metrics.close()
        self._timing.close()

    def read(self, results: Sequence[Result], stop: StopRequest, *, due: bool) -> Reading:
        """The gradient's norm, and if the step is to be logged, its metrics. Collective if due; one wait for
        the device in any case.
        """
        training = self._training
        norm = training.gradient_norm()
        if not due:
            return Reading(norm.item(), {}, {}, bool(stop) and training.plan.world_size == 1)
        names = ["loss", *sorted(results[0].metrics)]
        metrics = {name: torch.stack([_metric(result, name) for result in results]).mean() for name in names}
        signs = self._symptoms.measure(results)
        asked = norm.new_full((), float(bool(stop)))
        means = training.accelerator.reduce(torch.stack([*metrics.values(), *signs.values(), asked]), "mean")
        *values, stopping, gradient_norm = torch.cat([means, norm[None]]).tolist()
        measured, signed = values[: len(metrics)], values[len(metrics) :]
        return Reading(
            gradient_norm,
            dict(zip(metrics, measured, strict=True)),
            dict(zip(signs, signed, strict=True)),
            stopping=stopping > 0,
        )

    def write(self, step: int, reading: Reading, rate: float, *, skipped: bool) -> None:
        """Log finished step `step`, if it was read in full or skipped."""
        training = self._training
        if not reading.metrics and not skipped:
            return
        metrics = reading.metrics | {"gradient_norm": reading.gradient_norm}
        if skipped:
            metrics["skipped"] = training.skipped
        else:
            metrics |= self._symptoms.judge(step, reading.signs)
        epoch = step / training.plan.steps_per_epoch
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        throughput = (step - self._since_step) * training.config.train.batch_size / seconds
        self._since_step = step
        self._metrics.write({"step": step, "epoch": epoch, "lr": rate} | metrics)
        self._timing.write({"step": step, "seconds": seconds, "images_per_second": throughput})
        self._progress.update(step, metrics, throughput)
        self._track(metrics | {"lr": rate, "epoch": epoch}, step)

    def note(self, step: int, values: dict[str, Any]) -> None:
        """Log what was measured between two steps, such as k-NN accuracy; nothing can be without labels."""
        if values:
            self._metrics.write({"step": step} | values)
            self._track(values, step)
        self._since, self._since_step = time.perf_counter(), step

    def _track(self, values: dict[str, Any], step: int) -> None:
        accelerator = self._training.accelerator
        with runs.writing(Path(accelerator.project_dir)):
            accelerator.log(values, step=step)


def _metric(result: Result, name: str) -> Tensor:
    return (result.loss if name == "loss" else result.metrics[name]).detach().float()
