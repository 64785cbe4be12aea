"""What does evaluation take beside the bare forward, scikit-learn and lightly?

Features of 50,000 + 10,000 images, 512 wide, in Gaussian clusters that overlap, so that a probe has something
to do. Accuracies stand beside the seconds: contenders must find the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from fastgessl import pipelines
from fastgessl.config import ModelConfig
from fastgessl.evaluate import Features, SgdProtocol, extract_features, gradient_probe, knn_classify
from fastgessl.models import build_backbone

WIDTH, CLASSES = 512, 10


def clusters(count: int, seed: int) -> Features:
    """Overlapping clusters, the same means for every seed."""
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(100)) * 0.12
    labels = torch.arange(count) % CLASSES
    points = means[labels] + torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Features(points, labels, torch.arange(count))


@pytest.fixture
def features(tiny: bool) -> tuple[Features, Features]:
    train, test = (500, 100) if tiny else (50_000, 10_000)
    return clusters(train, 0), clusters(test, 1)


def test_extraction(contend: Any, tiny: bool) -> None:
    """`extract_features` with its loader against the bare encoder on views that are there already."""
    count = 64 if tiny else 256
    generator = np.random.default_rng(0)
    images = pipelines.ArrayImages(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    view = pipelines.evaluation_view(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    loader = pipelines.build(images, [view], batch_size=64, training=False)
    model = ModelConfig(stem="small", width=0.125 if tiny else 1.0)
    encoder = build_backbone(model).eval().to(memory_format=torch.channels_last)
    ready = [batch.views[0] for batch in loader]

    @torch.no_grad()
    def bare() -> None:
        for views in ready:
            encoder(views)

    contenders = {"ours": lambda: extract_features(encoder, loader, "cpu"), "bare forward": bare}
    contend({"what": "extraction", "images": count}, contenders)


def test_probe(contend: Any, keep: Any, features: tuple[Features, Features]) -> None:
    """Our probe with all its learning rates, and scikit-learn's optimum at one strength."""
    train, test = features

    def ours() -> float:
        return gradient_probe(train, test, SgdProtocol())["accuracy"]

    def scikit_learn() -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500))
        probe.fit(train.features.numpy(), train.labels)
        return float(probe.score(test.features.numpy(), test.labels))

    judge("linear probe", {"ours": ours, "scikit-learn": scikit_learn}, contend, keep)


def test_k_nn(contend: Any, keep: Any, features: tuple[Features, Features]) -> None:
    """k 20, cosine, temperature 0.07."""
    train, test = features

    def ours() -> float:
        return knn_classify(train, test, 20, 0.07)

    def lightly() -> float:
        # 256 images at a time, as lightly's own benchmarks do.
        bank = F.normalize(train.features, dim=1).T.contiguous()
        queries = F.normalize(test.features, dim=1).split(256)
        found = [
            knn_predict(part, bank, train.labels, CLASSES, knn_k=20, knn_t=0.07)[:, 0] for part in queries
        ]
        return (torch.cat(found) == test.labels).double().mean().item()

    def scikit_learn() -> float:
        weights = {"weights": lambda distance: np.exp((1 - distance) / 0.07)}
        oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", **weights)
        oracle.fit(train.features.numpy(), train.labels)
        return float(oracle.score(test.features.numpy(), test.labels))

    judge("k-NN", {"ours": ours, "lightly": lightly, "scikit-learn": scikit_learn}, contend, keep)


def judge(what: str, contenders: dict[str, Callable[[], float]], contend: Any, keep: Any) -> None:
    """Time the contenders, and keep their accuracies beside."""
    accuracies: dict[str, float] = {}

    def remembered(name: str) -> None:
        accuracies[name] = contenders[name]()

    rows = contend({"what": what}, {name: partial(remembered, name) for name in contenders})
    for name, accuracy in accuracies.items():
        rows[name]["accuracy"] = accuracy
    keep({"what": what}, rows)
