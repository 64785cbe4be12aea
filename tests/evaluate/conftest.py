"""Small labelled data, and loaders of the shape that the pipelines yield."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastgessl.evaluate import Features


@dataclass(frozen=True)
class Batch:
    views: list[Tensor]
    index: Tensor
    label: Tensor | None


def batches(
    views: list[Tensor], labels: Tensor | None, batch_size: int = 8, order: Tensor | None = None
) -> list[Batch]:
    """Every image once, in `order`; each view is (N, 3, S, S)."""
    order = torch.arange(len(views[0])) if order is None else order
    return [
        Batch([view[rows] for view in views], rows, None if labels is None else labels[rows])
        for rows in order.split(batch_size)
    ]


@pytest.fixture
def loader() -> Callable[..., list[Batch]]:
    return batches


def clusters(count: int, width: int, classes: int, seed: int, spread: float = 1.0) -> Features:
    """Gaussian clusters around class means that depend on `classes` and `width` only; columns of unequal
    scale and offset.
    """
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(1000))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    points = means[labels] + spread * torch.randn(count, width, generator=generator)
    return Features(points * torch.linspace(0.1, 3, width) + 5, labels, torch.arange(count))


@pytest.fixture
def cluster_features() -> Callable[..., Features]:
    return clusters
