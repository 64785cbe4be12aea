"""Evaluation universality: how near a frozen model comes to the model specialised to each task, in σ.

"Explicitly Modeling Universality into Self-Supervised Learning", arXiv 2405.01053v4. σ of a task is the mean
KL(π* ‖ π_f) over its images: π_f a probe on the frozen features, π* the labels or a supervised model of the
task's own. The paper asks for three things, and each is a set of tasks: discriminability (the training images
of the training classes), generalisation (unseen images of these classes), and transferability (unseen data
sets). docs/universality.md maps the definitions to these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.evaluate.features import Features
from fastgessl.evaluate.gradient_probes import GradientProbe, fit_gradient_probe
from fastgessl.evaluate.linear import VALIDATION_FRACTION, LinearProbe, fit_probe
from fastgessl.evaluate.splits import hold_out, require_labels

GROUPS = ("discriminability", "generalisation", "transferability")


@dataclass(frozen=True)
class TaskSigma:
    """σ of one model on one task."""

    task: str
    """The data set."""
    group: str
    """discriminability, generalisation or transferability."""
    sigma: float
    """Mean KL(π* ‖ π_f), nats."""
    accuracy: float
    """Of the same probe on the same images: a low σ is not by itself a high accuracy."""
    target: str
    """What π* is: labels or supervised."""
    probe: str
    """What π_f is: linear or mlp, whichever had the lower cross-entropy on a fifth of the task's training
    images."""
    images: int


@dataclass(frozen=True)
class UniversalityResult:
    """σ of one model on all tasks; low is universal."""

    tasks: tuple[TaskSigma, ...]
    groups: dict[str, float]
    """Sum of σ over the tasks of each group."""
    total: float
    """Sum over all tasks, the paper's evaluation universality."""


def kl_divergence(target: Tensor, model: Tensor) -> float:
    """Mean over rows of KL(target ‖ model), log-probabilities (N, C) each, in nats; a target of probability 0
    counts 0.

    >>> same = torch.tensor([[0.25, 0.75]]).log()
    >>> kl_divergence(same, same)
    0.0
    """
    terms = torch.where(target == -torch.inf, 0.0, target.exp() * (target - model))
    return terms.sum(dim=1).mean().item()


def label_log_probabilities(columns: Tensor, classes: int) -> Tensor:
    """One-hot labels (N,) as log-probabilities (N, C) float64: 0 for the label, −∞ for the rest."""
    return F.one_hot(columns, classes).double().log()


def choose_probe(
    train: Features, *, hidden: int, epochs: int, seed: int = 0
) -> tuple[str, LinearProbe | GradientProbe]:
    """("linear", probe) or ("mlp", probe), fitted on all training images: the one whose cross-entropy on a
    held-out fifth was lower.

    The linear one where no class can give a fifth away. Raises UsageError as `linear_probe` does.
    """
    labels, _ = require_labels("universality", train.labels, train.labels)
    fitted, held = hold_out(labels, VALIDATION_FRACTION, torch.Generator().manual_seed(seed))
    if len(held):
        part, rest = train.subset(fitted), train.subset(held)
        linear, mlp = fit_probe(part, seed), fit_gradient_probe(part, hidden=hidden, epochs=epochs, seed=seed)
        if _cross_entropy(mlp, rest) < _cross_entropy(linear, rest):
            rates = (mlp.learning_rate,)
            return "mlp", fit_gradient_probe(train, hidden=hidden, epochs=epochs, seed=seed, rates=rates)
    return "linear", fit_probe(train, seed)


def task_sigma(
    task: str,
    group: str,
    images: Features,
    probe: LinearProbe | GradientProbe,
    kind: str,
    target: Tensor | None = None,
) -> TaskSigma:
    """σ on labelled images; `target` (N, C) are log-probabilities of the task's own model, None for the
    labels.
    """
    assert images.labels is not None
    model = probe.log_probabilities(images.features)
    columns = probe.columns(images.labels)
    own = label_log_probabilities(columns, len(probe.classes)) if target is None else target.double()
    accuracy = (model.argmax(dim=1) == columns).double().mean().item()
    name = "labels" if target is None else "supervised"
    return TaskSigma(task, group, kl_divergence(own, model), accuracy, name, kind, len(images))


def summed(tasks: list[TaskSigma]) -> UniversalityResult:
    """The tasks with the sums of σ by group and over all.

    >>> summed([TaskSigma("a", "generalisation", 0.5, 0.9, "labels", "linear", 10)]).total
    0.5
    """
    groups: Mapping[str, list[float]] = {
        group: [task.sigma for task in tasks if task.group == group] for group in GROUPS
    }
    sums = {group: sum(values) for group, values in groups.items() if values}
    return UniversalityResult(tuple(tasks), sums, sum(sums.values()))


def _cross_entropy(probe: LinearProbe | GradientProbe, images: Features) -> float:
    assert images.labels is not None
    columns = probe.columns(images.labels)
    return kl_divergence(
        label_log_probabilities(columns, len(probe.classes)), probe.log_probabilities(images.features)
    )
