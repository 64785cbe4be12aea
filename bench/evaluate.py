"""Evaluation against its targets, and beside scikit-learn and lightly: `python -m bench.evaluate [--small]
[--out DIR]`.

Feature extraction against the encoder's bare forward on the same batches, in turns; a linear probe with eight
learning rates over 50,000 x 512 features beside scikit-learn's logistic regression; k-NN of 10,000 against
50,000 x 512 beside scikit-learn's and lightly's. CPU seconds, all threads together, stand beside those on the
clock: on a busy machine only they say what the work takes. `--small` tries it out in a hundredth of the size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.utils.benchmarking import knn_predict
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from bench import results
from fastgessl import pipelines
from fastgessl.config import ModelConfig
from fastgessl.evaluate import Features, extract_features, gradient_probe, knn_classify
from fastgessl.evaluate.gradient_probes import LEARNING_RATES
from fastgessl.models import build_backbone

WIDTH, CLASSES = 512, 10
TARGETS = {"extraction_share": 0.95, "probe_seconds": 60.0, "knn_seconds": 15.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a hundredth of the size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args()
    train, test = (500, 100) if arguments.small else (50_000, 10_000)
    measured: dict[str, Any] = {
        "train": train,
        "test": test,
        "width": WIDTH,
        "classes": CLASSES,
        "targets": TARGETS,
    }
    measured["load"] = os.getloadavg()[0]
    measured |= extraction(64 if arguments.small else 256, arguments.rounds)
    features = clusters(train, seed=0), clusters(test, seed=1)
    measured |= probes(*features)
    measured |= neighbours(*features)
    path = results.write("evaluate", measured | {"small": arguments.small}, arguments.out)
    Console().print(table(measured))
    print(path)


def clusters(count: int, seed: int) -> Features:
    """Gaussian clusters, overlapping, so that a probe has something to do."""
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(100)) * 0.12
    labels = torch.arange(count) % CLASSES
    points = means[labels] + torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Features(points, labels, torch.arange(count))


def extraction(count: int, rounds: int) -> dict[str, Any]:
    """Images a second through `extract_features` with its loader, and through the bare encoder on views that
    are there already.
    """
    generator = np.random.default_rng(0)
    images = pipelines.ArrayImages(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    view = pipelines.evaluation_view(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    loader = pipelines.build(images, [view], batch_size=64, training=False)
    encoder = build_backbone(ModelConfig(stem="small")).eval().to(memory_format=torch.channels_last)
    ready = [batch.views[0] for batch in loader]
    whole, bare = [], []
    for _ in range(rounds + 1):
        whole.append(timed(lambda: extract_features(encoder, loader, "cpu")))
        bare.append(timed(lambda: forward(encoder, ready)))
    # Shares within a round: what else the machine does slows both halves of a round alike. The first round
    # warms up.
    clock, cpu = (
        [alone[kind] / together[kind] for together, alone in zip(whole[1:], bare[1:], strict=True)]
        for kind in (0, 1)
    )
    return {
        "extraction_images_per_second": count / statistics.median(took for took, _ in whole[1:]),
        "bare_images_per_second": count / statistics.median(took for took, _ in bare[1:]),
        "extraction_share": statistics.median(clock),
        "extraction_shares": clock,
        "extraction_cpu_share": statistics.median(cpu),
        "extraction_cpu_shares": cpu,
    }


@torch.no_grad()
def forward(encoder: nn.Module, views: list[Tensor]) -> None:
    for view in views:
        encoder(view)


def probes(train: Features, test: Features) -> dict[str, Any]:
    """Seconds and accuracy of our probe with all its learning rates, and of scikit-learn's optimum at one
    strength.
    """
    found: dict[str, Any] = {}
    took, cpu = timed(lambda: found.update(ours=gradient_probe(train, test)))
    labels, test_labels = numbers(train), numbers(test)
    scaler = StandardScaler().fit(train.features.numpy())
    inputs, test_inputs = scaler.transform(train.features.numpy()), scaler.transform(test.features.numpy())
    regression = LogisticRegression(C=1.0, max_iter=500)
    other, other_cpu = timed(lambda: regression.fit(inputs, labels))
    return {
        "probe_learning_rates": len(LEARNING_RATES),
        "probe_epochs": found["ours"].epochs,
        "probe_seconds": took,
        "probe_cpu_seconds": cpu,
        "probe_accuracy": found["ours"].accuracy,
        "sklearn_one_fit_seconds": other,
        "sklearn_one_fit_cpu_seconds": other_cpu,
        "sklearn_accuracy": float(regression.score(test_inputs, test_labels)),
    }


def neighbours(train: Features, test: Features) -> dict[str, Any]:
    """Seconds and accuracy of k-NN, k 20, cosine, T 0.07, by us, lightly and scikit-learn."""
    found: dict[str, float] = {}
    took, cpu = timed(lambda: found.update(ours=knn_classify(train, test, 20, 0.07)))
    peer, peer_cpu = timed(lambda: found.update(lightly=lightly_accuracy(train, test)))
    oracle = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    oracle.fit(train.features.numpy(), numbers(train))
    other, other_cpu = timed(
        lambda: found.update(sklearn=float(oracle.score(test.features.numpy(), numbers(test))))
    )
    return {
        "knn_seconds": took,
        "knn_cpu_seconds": cpu,
        "knn_lightly_seconds": peer,
        "knn_lightly_cpu_seconds": peer_cpu,
        "knn_sklearn_seconds": other,
        "knn_sklearn_cpu_seconds": other_cpu,
        "knn_accuracy": found["ours"],
        "knn_lightly_accuracy": found["lightly"],
        "knn_sklearn_accuracy": found["sklearn"],
    }


def numbers(features: Features) -> NDArray[np.int64]:
    """The labels (N,)."""
    assert features.labels is not None
    return features.labels.numpy()


def lightly_accuracy(train: Features, test: Features) -> float:
    """lightly's k-NN, fed 256 images at a time as its own benchmarks feed it."""
    assert train.labels is not None and test.labels is not None
    bank = F.normalize(train.features, dim=1).T.contiguous()
    predicted = [
        knn_predict(F.normalize(part, dim=1), bank, train.labels, num_classes=CLASSES, knn_k=20, knn_t=0.07)[
            :, 0
        ]
        for part in test.features.split(256)
    ]
    return (torch.cat(predicted) == test.labels).double().mean().item()


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of CPU over all threads."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def table(measured: dict[str, Any]) -> Table:
    def cell(name: str, accuracy: str) -> str:
        took, cpu = measured[f"{name}_seconds"], measured[f"{name}_cpu_seconds"]
        return f"{took:.1f} s, CPU {cpu:.1f} s\n{100 * measured[accuracy]:.1f} %"

    size = f"{measured['train']} x {measured['width']} features, {measured['test']} queries"
    shown = Table(title=f"{size}, {torch.get_num_threads()} threads; load {measured['load']:.1f}")
    for column in ("what", "ours", "target", "scikit-learn", "lightly"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    shares = f"{100 * measured['extraction_share']:.1f} % of bare, CPU {100 * measured['extraction_cpu_share']:.1f} %"
    shown.add_row("feature extraction", shares, "≥ 95 %", "", "")
    about = f"linear probe\n{measured['probe_learning_rates']} rates, {measured['probe_epochs']} epochs"
    one_fit = "one fit: " + cell("sklearn_one_fit", "sklearn_accuracy")
    shown.add_row(about, cell("probe", "probe_accuracy"), "≤ 60 s", one_fit, "")
    peers = cell("knn_sklearn", "knn_sklearn_accuracy"), cell("knn_lightly", "knn_lightly_accuracy")
    shown.add_row("k-NN\nk 20, cosine", cell("knn", "knn_accuracy"), "≤ 15 s", *peers)
    return shown


if __name__ == "__main__":
    main()
