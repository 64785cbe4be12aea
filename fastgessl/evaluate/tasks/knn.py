"""k-nearest-neighbour classification of frozen features: no training, one number.

Weighted by cosine: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
CVPR 2018, §3.4. Majority by Euclidean distance: Ermolov et al., "Whitening for Self-Supervised Representation
Learning", ICML 2021.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate.features import Features, RowFeatures
from fastgessl.evaluate.sources import require_labels
from fastgessl.evaluate.tables import accuracies, percent
from fastgessl.evaluate.tasks.base import EvaluationTask, register

# Measured: 13 s for 10,000 against 50,000 × 512.
SECONDS_PER_PRODUCT = 5e-11
# Similarities held at once, as numbers: 128 MiB of float32.
SIMILARITIES_AT_ONCE = 2**25


@dataclass(frozen=True)
class Neighbours:
    """A k-NN protocol, which belongs beside its number."""

    metric: Literal["cosine", "euclidean"]
    k: int
    temperature: float = 0.0
    """T of the vote exp(cos/T); 0 under euclidean, where each neighbour has one vote."""


# DINO's evaluation, CIFAR's (InstDisc, lightly), and that of W-MSE, DSA and GeSSL's tables.
PUBLISHED = (Neighbours("cosine", 20, 0.07), Neighbours("cosine", 200, 0.1), Neighbours("euclidean", 5))


def _heading(protocol: Neighbours) -> str:
    vote = f"T {protocol.temperature:g}" if protocol.temperature else "majority"
    return f"k-NN\n{protocol.metric}\nk {protocol.k}\n{vote}"


def knn_classify(train: Features, test: Features, k: int, temperature: float) -> float:
    """Accuracy of the vote Σ exp(cos/T) over the k training images of the highest cosine similarity.

    k, T and the metric belong beside the number wherever it is printed. Raises UsageError if k exceeds the
    training images, and for labels or features that allow no classifier, as `linear_probe` does.

    >>> features = Features(torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2), torch.arange(6))
    >>> knn_classify(features, features, k=2, temperature=0.07)
    1.0
    """
    protocol = Neighbours("cosine", k, temperature)
    return _accuracies("knn", train, test, (protocol,))[protocol]


def knn_protocols(
    train: Features, test: Features, protocols: tuple[Neighbours, ...] = PUBLISHED
) -> dict[Neighbours, float]:
    """Accuracy under each protocol; those that share a metric share one search. Raises UsageError as
    `knn_classify` does.

    A majority that is tied goes to the class of the lowest label, as in scikit-learn.

    >>> features = Features(torch.eye(3).repeat(8, 1), torch.arange(3).repeat(8), torch.arange(24))
    >>> knn_protocols(features, features, (Neighbours("euclidean", 5),))
    {Neighbours(metric='euclidean', k=5, temperature=0.0): 1.0}
    """
    return _accuracies("knn_protocols", train, test, protocols)


def _accuracies(
    task: str, train: Features, test: Features, protocols: tuple[Neighbours, ...]
) -> dict[Neighbours, float]:
    labels, _ = require_labels(task, train.labels, test.labels)
    train.require_finite("training images")
    test.require_finite("test images")
    obstacle = too_few_neighbours(task, len(train), protocols)
    if obstacle:
        raise UsageError(obstacle)
    classes, columns = labels.unique(return_inverse=True)
    found: dict[Neighbours, float] = {}
    for metric in dict.fromkeys(protocol.metric for protocol in protocols):
        same = [protocol for protocol in protocols if protocol.metric == metric]
        votes = _votes_of(train.features, columns, test.features, same, len(classes))
        found |= {
            each: test.accuracy_of(classes[vote.argmax(dim=1)])
            for each, vote in zip(same, votes, strict=True)
        }
    return {protocol: found[protocol] for protocol in protocols}


def too_few_neighbours(task: str, count: int, protocols: tuple[Neighbours, ...]) -> str:
    """Why some protocol's neighbours cannot be found among `count` training images; empty if they can."""
    most = max(protocol.k for protocol in protocols)
    if most <= count:
        return ""
    wanted, advice = f"a protocol takes {most} neighbours", "Leave knn_protocols out."
    if task == "knn":
        wanted, advice = f"evaluate.knn_k is {most}", f"Choose --evaluate.knn_k {count} or less."
    return f"{wanted}, but there are only {count} training images. {advice}"


def _votes_of(
    train: Tensor, columns: Tensor, test: Tensor, protocols: list[Neighbours], classes: int
) -> list[Tensor]:
    """The vote of each protocol, (M, C) float32; all have one metric."""
    keys, queries, offset = _compared(train, test, protocols[0].metric)
    votes = [torch.zeros(len(test), classes) for _ in protocols]
    k = max(protocol.k for protocol in protocols)
    chunk = max(1, SIMILARITIES_AT_ONCE // len(train))
    for start in range(0, len(test), chunk):
        nearest, neighbours = torch.addmm(offset, queries[start : start + chunk], keys.T).topk(k, dim=1)
        for protocol, vote in zip(protocols, votes, strict=True):
            weights = torch.ones(len(nearest), protocol.k)
            if protocol.temperature:
                # Softmax: the same vote as exp(cos/T), divided by its sum; exp alone overflows float32 below
                # T = 0.012.
                weights = (nearest[:, : protocol.k] / protocol.temperature).softmax(dim=1)
            vote[start : start + chunk].scatter_add_(1, columns[neighbours[:, : protocol.k]], weights)
    return votes


def _compared(train: Tensor, test: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (N, F), queries (M, F) and an offset (1, N): offset + queries·keysᵀ is greater, the nearer a key
    is to a query.
    """
    if metric == "cosine":
        return F.normalize(train, dim=1), F.normalize(test, dim=1), torch.zeros(1, len(train))
    # −‖q − k‖²/2 without ‖q‖², which is the same for all keys. About the common mean, where float32 loses
    # least to cancellation.
    center = train.mean(dim=0)
    keys = train - center
    return keys, test - center, -keys.square().sum(dim=1)[None] / 2


def _measure_knn(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    protocol = _configured(settings)
    found = _accuracies("knn", features.train, features.test, (protocol,))
    return {"accuracy": found[protocol], **asdict(protocol)}


def _measure_protocols(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    found = knn_protocols(features.train, features.test)
    return {"protocols": [{**asdict(each), "accuracy": accuracy} for each, accuracy in found.items()]}


def _configured(settings: EvaluateConfig) -> Neighbours:
    """The protocol of the task `knn`."""
    return Neighbours("cosine", settings.knn_k, settings.knn_temperature)


register(
    EvaluationTask(
        "knn",
        _measure_knn,
        columns=lambda settings: [percent(_heading(_configured(settings)))],
        place=(0, 2),
        default=True,
        transfer=True,
        obstacle=lambda facts, settings: too_few_neighbours(
            "knn", len(facts.labels[0]), (_configured(settings),)
        ),
        seconds=lambda facts, settings: (
            SECONDS_PER_PRODUCT * len(facts.labels[0]) * len(facts.labels[1]) * facts.width
        ),
    )
)
register(
    EvaluationTask(
        "knn_protocols",
        _measure_protocols,
        columns=lambda settings: accuracies([_heading(protocol) for protocol in PUBLISHED], "protocols"),
        place=(1, 2),
        transfer=True,
        obstacle=lambda facts, settings: too_few_neighbours("knn_protocols", len(facts.labels[0]), PUBLISHED),
    )
)
