"""Weighted k-nearest-neighbour classification of frozen features: no training, one number.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, §3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate.features import Features
from fastgessl.evaluate.splits import require_labels

# Similarities held at once, as numbers: 128 MiB of float32.
SIMILARITIES_AT_ONCE = 2**25


def knn_classify(train: Features, test: Features, k: int, temperature: float) -> float:
    """Accuracy of the vote Σ exp(cos/T) over the k training images of the highest cosine similarity.

    k, T and the metric belong beside the number wherever it is printed. Raises UsageError if k exceeds the training images, and for
    labels or features that allow no classifier, as `linear_probe` does.

    >>> features = Features(torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2), torch.arange(6))
    >>> knn_classify(features, features, k=2, temperature=0.07)
    1.0
    """
    labels, test_labels = require_labels("knn", train.labels, test.labels)
    train.require_finite("training images")
    test.require_finite("test images")
    obstacle = too_few_neighbours(len(train), k)
    if obstacle:
        raise UsageError(obstacle)
    classes, columns = labels.unique(return_inverse=True)
    votes = knn_votes(train.features, columns, test.features, k, temperature, len(classes))
    return (classes[votes.argmax(dim=1)] == test_labels).double().mean().item()


def too_few_neighbours(count: int, k: int) -> str:
    """Why k neighbours cannot be found among `count` training images; empty if they can."""
    if k <= count:
        return ""
    return f"evaluate.knn_k is {k}, but there are only {count} training images. Choose --evaluate.knn_k {count} or less."


def knn_votes(train: Tensor, columns: Tensor, test: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Train (N, F) with class numbers `columns` (N,) and test (M, F) -> each class's share of the weighted vote, (M, C) float32."""
    keys = F.normalize(train, dim=1)
    votes = torch.zeros(len(test), classes)
    chunk = max(1, SIMILARITIES_AT_ONCE // len(train))
    for start in range(0, len(test), chunk):
        similarity = F.normalize(test[start : start + chunk], dim=1) @ keys.T
        nearest, neighbours = similarity.topk(k, dim=1)
        # Softmax: the same vote as exp(cos/T), divided by its sum; exp alone overflows float32 below T = 0.012.
        votes[start : start + chunk].scatter_add_(1, columns[neighbours], (nearest / temperature).softmax(dim=1))
    return votes
