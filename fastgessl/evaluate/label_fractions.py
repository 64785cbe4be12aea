"""What a share of the labels is enough for: the linear probe on 1 % and 10 % of them, on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgessl.evaluate.features import Features
from fastgessl.evaluate.linear import fit_probe, score
from fastgessl.evaluate.splits import require_labels


@dataclass(frozen=True)
class FractionResult:
    """Accuracy with a share of the labels."""

    fraction: float
    labelled: int
    """Images whose labels were seen, a draw."""
    accuracy: float
    """Mean over draws."""
    deviation: float
    """Standard deviation (n − 1) over draws; 0 for one."""
    draws: tuple[float, ...]


def draw_fraction(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Row numbers, increasing: `fraction` of each class of `labels` (N,), rounded, at least one image.

    >>> draw_fraction(torch.tensor([0] * 20 + [1] * 3), 0.1, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        take = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:take]])
    return torch.cat(chosen).sort().values


def label_fraction_probe(
    train: Features, test: Features, fraction: float, *, draws: int = 3, seed: int = 0
) -> FractionResult:
    """The linear probe of `linear_probe` on random, stratified shares of the training labels.

    Nothing outside the share is used, its λ included: that is chosen on a fifth of the share. Draws depend on
    training labels and seed alone. Raises UsageError as `linear_probe` does.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> label_fraction_probe(features, features, 0.25).labelled
    8
    """
    labels, _ = require_labels("label_fractions", train.labels, test.labels)
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for _ in range(draws):
        rows = draw_fraction(labels, fraction, generator)
        part = train.subset(rows)
        accuracies.append(score(fit_probe(part, seed), part, test).accuracy)
    deviation = float(np.std(accuracies, ddof=1)) if draws > 1 else 0.0
    return FractionResult(fraction, len(rows), float(np.mean(accuracies)), deviation, tuple(accuracies))
