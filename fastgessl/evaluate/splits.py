"""Which images a probe may learn from and which it is judged on: seeded, stratified, from training labels
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgessl.config import UsageError


def hold_out(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row numbers (kept, held), both increasing; `fraction` of each class of `labels` (N,) is held, never a
    whole class.

    A class of one or two images gives none away at a fifth, so `held` may be empty.

    >>> kept, held = hold_out(torch.tensor([0] * 10 + [1] * 5), 0.2, torch.Generator().manual_seed(0))
    >>> len(kept), (held < 10).sum().item(), (held >= 10).sum().item()
    (12, 2, 1)
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        take = min(round(fraction * len(members)), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def draw_labelled(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Row numbers of `per_class` random images of each class, (C·per_class,).

    Raises UsageError if a class has fewer.

    >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])
    >>> labels[draw_labelled(labels, 2, torch.Generator().manual_seed(0))]
    tensor([0, 0, 1, 1])
    """
    obstacle = too_few_labels(labels, per_class)
    if obstacle:
        raise UsageError(obstacle)
    shuffled = torch.randperm(len(labels), generator=generator)
    return torch.cat([shuffled[labels[shuffled] == label][:per_class] for label in labels.unique()])


def too_few_labels(labels: Tensor, per_class: int) -> str:
    """Why `per_class` labelled images a class cannot be drawn; empty if they can."""
    classes, counts = labels.unique(return_counts=True)
    fewest, smallest = int(counts.min()), int(classes[counts.argmin()])
    if fewest >= per_class:
        return ""
    return (
        f"evaluate.labels_per_class is {per_class}, but class {smallest} has only {fewest} training images. "
        f"Choose --evaluate.labels_per_class {fewest} or less."
    )


def unusable_labels(train: Tensor | None, test: Tensor | None) -> str:
    """Why these labels, (N,) and (M,) int64, do not allow a classifier to be trained and judged; empty if
    they do.
    """
    if train is None or test is None:
        return f"the {'training' if train is None else 'test'} images have no labels. Add labels, or choose --evaluate.tasks geometry."
    if len(test) == 0:
        return "there is no test split, and no class has the three images that a fifth can be held out of. Add test images."
    classes = train.unique()
    if len(classes) < 2:
        return f"all {len(train)} training images are of class {int(classes[0])}, so there is nothing to tell apart. Add a second class."
    unseen = test.unique()[~torch.isin(test.unique(), classes)]
    if len(unseen):
        shown = ", ".join(str(int(label)) for label in unseen[:5])
        return (
            f"{len(unseen)} classes of the test images (labels {shown}) have no training image, so no probe "
            "can know them. "
            "Add training images of these classes, or leave them out of the test split."
        )
    return ""


def require_labels(task: str, train: Tensor | None, test: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both labels, or UsageError, naming the task, if they do not allow it."""
    obstacle = unusable_labels(train, test)
    if obstacle or train is None or test is None:
        raise UsageError(f"Task {task}: {obstacle}")
    return train, test
