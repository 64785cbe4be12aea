"""The shape of a representation: how many directions it uses, what augmentation does to it, how evenly it
fills the sphere.

All but the crowding ratio need no labels. Sums are float64.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.features import RowFeatures
from fastgessl.evaluate.tables import decimals, percent
from fastgessl.evaluate.tasks.base import EvaluationTask, register

# Pairs held at once, as numbers: 32 MiB of float64.
PAIRS_AT_ONCE = 2**22


def measure_geometry(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Geometry of two augmented views' features, (N, F) each, N >= 2, row i of both showing image i.

    effective_rank is that of the first views, uniformity the mean of both views, retrieval the mean of both
    directions. Retrieval gets harder with N, images, so that it is compared at equal N only.

    >>> views = torch.eye(4)
    >>> measured = measure_geometry(views, views)
    >>> measured["alignment"], measured["retrieval"], measured["images"]
    (0.0, 1.0, 4)
    """
    return {
        "effective_rank": effective_rank(first),
        "alignment": alignment(first, second),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
        "retrieval": (view_retrieval(first, second) + view_retrieval(second, first)) / 2,
        "images": len(first),
    }


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalized singular values of (N, F) features, not centered: between 1 and F
    directions that they use; 0 if all features are 0.

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", ICML 2023, eq. (1), without its ε.

    >>> round(effective_rank(torch.eye(8)), 6)
    8.0
    """
    wide = features.double()
    # Through the smaller Gram matrix: what float64 loses there lies below 1e-8 of the largest, finer than
    # float32 features are.
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if singular.sum() == 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean ‖x − y‖² over the images' two views, (N, F) each, on the unit sphere: 0 (invariant) to 4.

    Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020, §4.1, α = 2.

    >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    2.0
    """
    return (_on_sphere(first) - _on_sphere(second)).square().sum(dim=1).mean().item()


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(−2‖x − y‖²) over all pairs of different rows of (N, F) features on the unit
    sphere, N >= 2: -8 to 0, low is spread evenly.

    Wang & Isola 2020, §4.1, t = 2.

    >>> round(uniformity(torch.eye(3)), 6)
    -4.0
    """
    points = _on_sphere(features)
    count = len(points)
    total = 0.0
    for start, similarity in _similarities(points, points):
        kernel = (4 * similarity - 4).exp()
        kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = 0
        total += kernel.sum().item()
    return math.log(total / (count * (count - 1)))


def view_retrieval(queries: Tensor, keys: Tensor) -> float:
    """Share of rows of `queries` (N, F) whose most similar row of `keys` (N, F), by cosine, has the same
    number.

    >>> view_retrieval(torch.eye(3), torch.eye(3)[[0, 2, 1]])
    0.3333333333333333
    """
    hits = 0
    for start, similarity in _similarities(_on_sphere(queries), _on_sphere(keys)):
        hits += int((similarity.argmax(dim=1) == torch.arange(start, start + len(similarity))).sum())
    return hits / len(queries)


def crowding_ratio(features: Tensor, labels: Tensor) -> float:
    """Mean over classes of (mean distance of its images to its center) / (distance of that center to the
    nearest other center).

    Features (N, F) on the unit sphere, labels (N,) of at least two classes. Low is compact and far apart;
    infinite where two classes share a center.

    >>> crowding_ratio(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
    0.0
    """
    points = _on_sphere(features)
    classes, columns = labels.unique(return_inverse=True)
    counts = columns.bincount()
    centers = torch.zeros(len(classes), points.shape[1], dtype=points.dtype)
    centers = centers.index_add_(0, columns, points) / counts[:, None]
    distances = (points - centers[columns]).norm(dim=1)
    spread = torch.zeros(len(classes), dtype=points.dtype).index_add_(0, columns, distances) / counts
    nearest = torch.cdist(centers, centers).fill_diagonal_(math.inf).amin(dim=1)
    return math.inf if (nearest == 0).any() else (spread / nearest).mean().item()


def _on_sphere(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=1)


def _similarities(queries: Tensor, keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pairs (first row, cosines (n, N)), a few query rows at a time."""
    chunk = max(1, PAIRS_AT_ONCE // len(keys))
    for start in range(0, len(queries), chunk):
        yield start, queries[start : start + chunk] @ keys.T


def _measure(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    measured = measure_geometry(*features.view_pair)
    if features.classes > 1:
        assert features.train.labels is not None
        measured["crowding"] = crowding_ratio(features.train.features, features.train.labels)
    return measured


register(
    EvaluationTask(
        "geometry",
        _measure,
        columns=lambda settings: [
            decimals("eff.\nrank", "effective_rank", 1),
            decimals("align", "alignment", 3),
            decimals("unif.", "uniformity", 2),
            percent("view\nfound", "retrieval"),
            decimals("crowd.", "crowding", 2),
        ],
        place=(0, 4),
        default=True,
        needs_labels=False,
        needs_views=True,
    )
)
