"""How near a representation is to an idealised one, on which every task that augmentation leaves alone is
solved by a simple probe.

Dubois et al., "Improving Self-Supervised Learning by Characterizing Idealized Representations", NeurIPS 2022.
Images that are augmentations of each other form an equivalence class; a task is invariant if its labels are
constant on these classes. All such tasks are solved by a linear probe, from one labelled view of each class,
if the representation is invariant (views of a class coincide), wide enough (the C classes span C − 1
dimensions) and linearly predictable (a linear probe tells which class a view belongs to). A labelled task
with fewer classes needs fewer dimensions, C_labels − 1; an MLP probe needs fewer still.
"""

from typing import Any

import torch
from torch import Tensor

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate.features import Features, RowFeatures
from fastgessl.evaluate.tables import Column, percent
from fastgessl.evaluate.tasks.base import EvaluationTask, register
from fastgessl.evaluate.tasks.linear import fit_probe

# Each image is a class of the linear probe: 200 classes are fitted in seconds.
PREDICTED_IMAGES = 200
# Between-class directions below a thousandth of the largest singular value are noise to any probe.
RANK_TOLERANCE = 1e-3


def measure_conditions(
    first: Tensor, second: Tensor, label_classes: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The three conditions on two augmented views' features (N, F) of each image, N >= 2: an image is an
    equivalence class. Ideal are variation 0, dimension at least needed, predictability 1.

    variation is the share of the features' variance that lies within equivalence classes, and dimension what
    the class means span about their mean. needed are the dimensions of a linear probe for every invariant
    task of `label_classes` classes, C_labels − 1, or with 0, as without labels, for every task on these
    equivalence classes, C − 1. predictability is the share of second views whose class a linear probe names
    that learned from the first views alone, among `classes` random images, at most 200. Raises UsageError for
    fewer than two images.

    >>> views = torch.eye(4)
    >>> ideal = measure_conditions(views, views)
    >>> ideal["variation"], ideal["dimension"], ideal["needed"], ideal["predictability"]
    (0.0, 3, 3, 1.0)
    """
    if len(first) < 2:
        raise UsageError(
            f"Task conditions: there is {len(first)} image, and nothing to tell it from. Add images."
        )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(first), generator=generator)[:PREDICTED_IMAGES].sort().values
    return {
        "variation": within_share(first, second),
        "dimension": spanned_dimensions((first.double() + second.double()) / 2),
        "needed": (label_classes or len(first)) - 1,
        "predictability": linear_predictability(first[rows], second[rows]),
        "classes": len(rows),
    }


def within_share(first: Tensor, second: Tensor) -> float:
    """Variance between an image's two views over the variance of all views, (N, F) each: 0 where views
    coincide; 0 for a collapse too.

    >>> within_share(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [2.0]]))
    0.0
    """
    views = torch.stack([first, second]).double()
    means = views.mean(dim=0)
    within = (views - means).square().sum()
    total = (views - means.mean(dim=0)).square().sum()
    return 0.0 if total == 0 else (within / total).item()


def spanned_dimensions(means: Tensor) -> int:
    """Dimensions that the rows (C, F) span about their mean.

    >>> spanned_dimensions(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
    1
    """
    singular = torch.linalg.svdvals((means - means.mean(dim=0)).double())
    return 0 if singular[0] == 0 else int((singular > RANK_TOLERANCE * singular[0]).sum())


def linear_predictability(first: Tensor, second: Tensor) -> float:
    """Accuracy on the second views of a linear probe that learned on the first ones which row each is, (C, F)
    each.
    """
    classes = torch.arange(len(first))
    # One example per class leaves nothing to validate on, and the answer is a weight decay small enough to
    # separate what can be separated.
    probe = fit_probe(Features(first.float(), classes, classes), weight_decay=1e-4)
    return probe.accuracy(Features(second.float(), classes, classes))


def _measure(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    first, second = features.view_pair
    return measure_conditions(first, second, features.classes, seed)


register(
    EvaluationTask(
        "conditions",
        _measure,
        columns=lambda settings: [
            percent("variance\nwithin", "variation"),
            Column("dimensions\nof needed", lambda m: f"{m['dimension']} of {m['needed']}", "dimension"),
            percent("image\nnamed", "predictability"),
        ],
        place=(2, 1),
        needs_labels=False,
        needs_views=True,
    )
)
