"""Numbers going bad: skips a step that is not finite, and warns of a model that has collapsed."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import normalize

from fastgessl import runs
from fastgessl.config import UsageError
from fastgessl.objective import Result
from fastgessl.training.state import Training, total_norm

# Spread in the first 40 steps of eight methods on digits: 0.12 to 0.99; after a collapse 0.
COLLAPSED = 0.02
# Logged steps in a row: a teacher-student method may collapse in its first steps and recover.
PATIENCE = 100


@dataclass(frozen=True)
class Reading:
    """What the host learns of a step before the optimizer moves."""

    gradient_norm: float
    metrics: dict[str, float]
    """Means over ranks and micro-batches; empty if the step is not logged."""
    stopping: bool
    """Whether some rank was asked to stop."""


def poisoned(loss: Tensor) -> Tensor:
    """Returns the loss; if it is not finite, every gradient becomes NaN, and so do all ranks' when they are
    averaged.

    All ranks then agree to skip the step without a collective or a wait of its own.

    >>> weight = torch.ones((), requires_grad=True)
    >>> poisoned(weight / 0).backward()
    >>> weight.grad
    tensor(nan)
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def shape_of(projections: Tensor) -> Tensor:
    """Tells a collapse from projections (V, N, D): (2,), spread and directions in use, means over the views.

    Spread: standard deviation over the images of the normalized projections, times sqrt(D); 1 evenly over the
    sphere, 0 where all images are one point. Chen and He, "Exploring Simple Siamese Representation Learning",
    CVPR 2021, section 4.1.

    Directions: (Σλ)² / Σλ² of the eigenvalues λ of their covariance; between 1, all images on a line, and
    min(N - 1, D). It needs the covariance's trace and norm only: eigenvalues would cost more than a narrow
    network's step (RankMe, Garrido et al. 2023, is measured at the end of a run).

    >>> line = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    >>> [round(value, 1) for value in shape_of(line).tolist()]
    [0.6, 1.1]
    """
    rows = normalize(projections.detach().float(), dim=-1)
    spread = rows.std(dim=1, correction=0).mean() * rows.shape[-1] ** 0.5
    rows = rows - rows.mean(1, keepdim=True)
    gram = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    square = gram.square().sum((1, 2)).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.stack([spread, (trace.square() / square).mean()])


class Health:
    """Skips the optimizer step, method state and batch-norm statistics of a step whose loss or gradient is
    not finite, and warns once when the projections have collapsed.

    Raises UsageError after `train.nonfinite_limit` such steps in a row, with the state before the first of
    them in `run/nonfinite`.
    """

    def __init__(self, training: Training, run: Path) -> None:
        self._training = training
        self._run = run
        self._skipped_in_a_row = 0
        self._collapsed_in_a_row = 0
        self._generators: dict[str, Any] = {}

    def passes(self, reading: Reading, results: Sequence[Result]) -> bool:
        """Whether the step may be taken; every rank gets the same answer, because the norm is that of the
        averaged gradient.
        """
        training = self._training
        if -torch.inf < reading.gradient_norm < torch.inf:
            self._skipped_in_a_row = 0
            spread = reading.metrics.get("spread", 1.0)
            if reading.metrics:
                self._collapsed_in_a_row = self._collapsed_in_a_row + 1 if spread < COLLAPSED else 0
            if reading.metrics and self._collapsed_in_a_row == PATIENCE:
                training.accelerator.print(
                    f"fastgessl train: step {training.step + 1}: the projections have collapsed to one point "
                    f"(spread {spread:.2g}, of 1). Nothing is learned like this: lower --optim.base_lr, or "
                    "check the momentum and the batch norm of the heads.",
                    file=sys.stderr,
                    flush=True,
                )
            return True
        if self._skipped_in_a_row == 0:
            self._generators = training.generators
        self._skipped_in_a_row += 1
        training.skipped += 1
        training.statistics.restore()
        if training.accelerator.scaler is not None:
            training.optimizer.step()  # GradScaler takes no such step either, but lowers its scale
        if self._skipped_in_a_row == training.config.train.nonfinite_limit:
            self._give_up(results)
        return False

    def _give_up(self, results: Sequence[Result]) -> None:
        training, count = self._training, self._skipped_in_a_row
        # All of them, since the norms of sharded tensors are collectives that every rank must join.
        found = gather_object([[*_offenders(training, results), "the norm of the gradient"][0]])
        rank, name = next(
            ((rank, name) for rank, name in enumerate(found) if not name.startswith("the gradient")),
            (0, found[0]),
        )
        before = training.save_before_skipped(self._run / "nonfinite", count, self._generators)
        raise UsageError(
            f"{count} steps in a row, {training.step + 2 - count} to {training.step + 1}, had a loss or "
            f"gradient that is not finite; they were skipped. In the last one, {name} was the first that was "
            f"not finite (rank {rank}). Lower --optim.base_lr or --gessl.inner_lr, or train with "
            "--train.precision fp32. To see it again, start from the state before these steps in a new "
            f"folder: {runs.continuation(self._run, before)}"
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
