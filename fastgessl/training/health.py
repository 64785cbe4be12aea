"""Numbers going bad: a step that is not finite is given back, and a model that has stopped learning is
pointed out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import normalize

from fastgessl import runs
from fastgessl.config import UsageError
from fastgessl.objective import Result
from fastgessl.training.collapse import directions_of
from fastgessl.training.sharding import total_norm
from fastgessl.training.state import Moment, Training

_FLAGS = {"spread": "collapsed", "directions": "one_direction", "information": "uninformed"}
# Spread of the projections, 1 = evenly over the sphere: 0.12 to 0.99 in the first 40 steps of eight methods
# on digits; 0 after a collapse. Directions that they use: 1.08 (MoCo) to 6.4 at the least in the first 60
# steps of ten methods on digits; 1 on a line. Information, nats: CISSL 0.98 at the least and DISSL 2.3 in the
# end in five runs on digits; 1e-5 in DISSL runs that stay at even assignments.
_FLAGGED_BELOW = {"spread": 0.02, "directions": 1.05, "information": 0.05}
# Readings in a row: a collapse may pass in the first steps of a teacher-student method, and DISSL's
# assignments were even for up to 88 steps of runs that went well; a queue changes with every step or not at
# all.
_PATIENCE = {"collapsed": 100, "one_direction": 100, "uninformed": 200, "stuck_queue": 3}


def poisoned(loss: Tensor) -> Tensor:
    """The loss with its value; if that is not finite, every gradient becomes NaN, and so do all ranks' when
    they are averaged.

    All ranks then agree to skip the step without a collective or a wait of its own.

    >>> weight = torch.ones((), requires_grad=True)
    >>> poisoned(weight / 0).backward()
    >>> weight.grad
    tensor(nan)
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class FiniteGuard:
    """Skips the optimiser step, method state and batch-norm statistics of a step whose loss or gradient is
    not finite.

    Raises UsageError after `limit` such steps in a row, with the state before the first of them in
    `run/nonfinite`.
    """

    def __init__(self, training: Training, run: Path, limit: int) -> None:
        self._training, self._run, self._limit = training, run, limit
        self._first: Moment | None = None
        self._present: Moment | None = None
        self.in_a_row = 0

    def remember(self, step: int) -> None:
        """Call it before the step consumes anything."""
        self._present = self._training.moment(step)

    def passes(self, gradient_norm: float, results: Sequence[Result]) -> bool:
        """Whether the step may be taken; every rank gets the same answer, because the norm is that of the
        averaged gradient.
        """
        if -torch.inf < gradient_norm < torch.inf:
            self.in_a_row, self._first = 0, None
            return True
        training = self._training
        self.in_a_row += 1
        training.skipped += 1
        self._first = self._first or self._present
        training.forget_forward()
        if training.accelerator.scaler is not None:
            training.optimizer.step()  # GradScaler takes no such step either, but lowers its scale
        if self.in_a_row == self._limit:
            self._give_up(results)
        return False

    def _give_up(self, results: Sequence[Result]) -> None:
        training, first = self._training, self._first
        assert first is not None
        # All of them, since the norms of sharded tensors are collectives that every rank must join.
        found = gather_object([[*_offenders(training, results), "the norm of the gradient"][0]])
        rank, name = next(
            ((rank, name) for rank, name in enumerate(found) if not name.startswith("the gradient")),
            (0, found[0]),
        )
        folder = self._run / "nonfinite"
        training.save_moment(folder, first)
        again = runs.continuation(self._run, str(folder / "checkpoints" / f"step-{first.step:09d}"))
        raise UsageError(
            f"{self.in_a_row} steps in a row, {first.step + 1} to {first.step + self.in_a_row}, had a loss "
            "or gradient that is not finite; "
            f"they were skipped. In the last one, {name} was the first that was not finite (rank {rank}). "
            "Lower --optim.base_lr or "
            "--gessl.inner_lr, or train with --train.precision fp32. To see it again, start from the state "
            "before these steps in a "
            f"folder of your choice: {again}"
        )


def _offenders(training: Training, results: Sequence[Result]) -> Iterator[str]:
    """What is not finite, causes before effects. Norms, because those of sharded weights are the same on
    every rank.
    """
    for name, parameter in training.method.named_parameters():
        if not total_norm([parameter]).isfinite():
            yield f"the weight {name}"
    for result in results:
        for name in ("features", "projections", "predictions"):
            tensor = getattr(result.outputs, name)
            if tensor is not None and not tensor.isfinite().all():
                yield f"the method's {name}"
        for name, value in (result.metrics | {"loss": result.loss}).items():
            if not value.isfinite():
                yield f"the metric {name}"
    for name, parameter in training.method.named_parameters():
        if parameter.grad is not None and not total_norm([parameter.grad]).isfinite():
            yield f"the gradient of {name}"


class Symptoms:
    """Signs that training runs but teaches nothing: collapsed projections, assignments that do not depend on
    the image, and a queue that no key enters any more."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def measure(self, results: Sequence[Result]) -> dict[str, Tensor]:
        """Numbers to be read with the step's metrics, each (): the spread, the directions in use, the
        information of assignments where a method measures them, and a sum over each queue."""
        spread = torch.stack([spread_of(result.outputs.projections) for result in results]).mean()
        # By name, since a method may replace its queue instead of writing into it.
        queues = {
            name: buffer for name, buffer in self._training.method.named_buffers() if _is_queue(name, buffer)
        }
        directions = torch.stack([directions_of(result.outputs.projections) for result in results]).mean()
        signs = {"spread": spread, "directions": directions}
        if {"maximality", "determinism"} <= results[0].metrics.keys():
            # H[mean p] - mean H[p] is what an assignment says of its image.
            signs["information"] = torch.stack(
                [result.metrics["maximality"] - result.metrics["determinism"] for result in results]
            ).mean()
        return signs | {name: queue.double().sum().float() for name, queue in queues.items()}

    def judge(self, step: int, measured: dict[str, float]) -> dict[str, float]:
        """What to log of them: all but the queues, and collapsed, one_direction, uninformed or stuck_queue
        (1.0) for as long as it lasts, said once."""
        readings, seen = self._training.symptoms["readings"], self._training.symptoms["seen"]
        # A queue of zeros has not begun to fill.
        stuck = {
            name: value != 0 and seen.get(name) == value
            for name, value in measured.items()
            if name not in _FLAGS
        }
        flags = {name: measured[name] for name in _FLAGS if name in measured}
        low = {name: value < _FLAGGED_BELOW[name] for name, value in flags.items()}
        for name, present in (low | stuck).items():
            flag = _FLAGS.get(name, "stuck_queue")
            readings[name] = readings.get(name, 0) + 1 if present else 0
            if readings[name] >= _PATIENCE[flag]:
                flags[flag] = 1.0
            if readings[name] == _PATIENCE[flag] and self._training.accelerator.is_main_process:
                print(f"fastgessl train: step {step}: {_advice(name, measured)}", file=sys.stderr, flush=True)
        seen.update(measured)
        return flags


def spread_of(projections: Tensor) -> Tensor:
    """Standard deviation over the images of their normalised projections (V, N, D), times sqrt(D): (). 1
    evenly over the sphere, 0 where all images are one point. Chen and He, "Exploring Simple Siamese
    Representation Learning", CVPR 2021, section 4.1.

    >>> spread_of(torch.ones(2, 8, 4))
    tensor(0.)
    """
    directions = normalize(projections.detach().float(), dim=-1)
    return directions.std(dim=1, correction=0).mean() * directions.shape[-1] ** 0.5


def _is_queue(name: str, buffer: Tensor) -> bool:
    return "queue" in name and buffer.is_floating_point()


def _advice(name: str, measured: dict[str, float]) -> str:
    if name == "directions":
        return (
            f"the projections lie on a line ({measured['directions']:.2g} directions). Lower "
            "--optim.base_lr, or lengthen "
            "--schedule.warmup_epochs."
        )
    if name == "spread":
        return (
            f"the projections have collapsed to one point (spread {measured['spread']:.2g}, of 1). Nothing "
            "is learned like this: lower "
            "--optim.base_lr, or check the momentum and the batch norm of the heads."
        )
    if name == "information":
        return (
            f"the assignments hardly depend on the image ({measured['information']:.2g} nats of "
            "information). Lower --optim.base_lr or the "
            "temperatures, or take a narrower representation."
        )
    return f"the method's {name} no longer changes: no key enters it. The method's update_state does not run, or its keys are constant."
