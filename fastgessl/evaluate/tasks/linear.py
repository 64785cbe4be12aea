"""Linear probes: multinomial logistic regression on standardized frozen features, with all labels, a share of
them, or a few per class; and σ, which is such a probe's cross-entropy.

The probe minimizes  mean cross-entropy + λ/2·‖W‖²  by L-BFGS (scikit-learn); the bias is free. λ, the weight
decay, is the only choice to make. With all labels it is made on a fifth of the training images; with a few
labels it is a constant. Labels of test images are read by `Probe.accuracy` alone, once everything is fixed.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.features import Features, RowFeatures
from fastgessl.evaluate.sources import (
    DataFacts,
    draw_fraction,
    draw_labelled,
    hold_out,
    require_labels,
    too_few_labels,
)
from fastgessl.evaluate.tables import Column, accuracies, decimals, percent, spread
from fastgessl.evaluate.tasks.base import EvaluationTask, register

WEIGHT_DECAYS = tuple(10.0**power for power in range(1, -7, -1))
VALIDATION_FRACTION = 0.2
# What five-fold cross-validation within ten labels per class chose most often: 19 of 30 draws (digits; raw
# pixels, a SimCLR and a BYOL encoder), and scikit-learn's default strength at 100 images. The search itself
# costs 40 times as much and reached the same accuracy within 0.1 points on each.
FEW_LABEL_WEIGHT_DECAY = 0.01
MAX_ITERATIONS = 500
# Measured: 20 s for a probe on 50,000 × 512 × 10 with its search, a fit alone a quarter.
SECONDS_PER_SEARCH = 8e-8
SECONDS_PER_FIT = 2e-8


@dataclass(frozen=True)
class Probe:
    """A classifier that was fitted on frozen features: linear, or through hidden layers with ReLU."""

    mean: Tensor
    """(F,) float32, of the training features."""
    scale: Tensor
    """(F,) float32, standard deviation of the training features; 1 where a feature is constant."""
    classes: Tensor
    """(C,) int64, increasing: the label of each output."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """(weight (outputs, inputs), bias (outputs,)) of each layer, float32, on standardized features."""
    chosen: dict[str, Any]
    """What was chosen on the way, and how it ended, as evaluation.json keeps it. By L-BFGS: weight_decay, λ,
    and whether it converged within its iterations. By SGD: learning_rate, and under validation the accuracy
    of each rate on the held-out fifth of the training images; empty where no class could give one away."""

    def log_probabilities(self, features: Tensor) -> Tensor:
        """(N, F) float32 -> (N, C) float64. In float64, so that a confident mistake costs its finite price
        instead of infinity.
        """
        (weight, bias), *further = self.layers
        outputs = F.linear((features - self.mean) / self.scale, weight, bias)
        for weight, bias in further:
            outputs = F.linear(outputs.relu(), weight, bias)
        return F.log_softmax(outputs.double(), dim=1)

    def predict(self, features: Tensor) -> Tensor:
        """(N, F) -> the most probable label of each, (N,)."""
        return self.classes[self.log_probabilities(features).argmax(dim=1)]

    def accuracy(self, images: Features) -> float:
        """Share of labelled images whose most probable class is their label."""
        return images.accuracy_of(self.predict(images.features))

    def cross_entropy(self, images: Features) -> float:
        """Mean cross-entropy of labelled images, nats."""
        assert images.labels is not None
        columns = torch.searchsorted(self.classes, images.labels)[:, None]
        return -self.log_probabilities(images.features).gather(1, columns).mean().item()


def linear_probe(
    train: Features, test: Features, seed: int = 0, probe: Probe | None = None
) -> dict[str, Any]:
    """Linear probe on all labels; λ by validation cross-entropy on a fifth of the training images, then
    refitted on all of them. `probe` as from `fit_probe`, fitted here if not given.

    accuracy is the share of test images classified correctly, labelled the number of training images;
    weight_decay and converged are the fit's. Raises UsageError without labels, with one class, for test
    classes that the training images lack, or for NaN features.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> linear_probe(features, features)["accuracy"]
    1.0
    """
    require_labels("linear", train.labels, test.labels)
    test.require_finite("test images")
    probe = probe or fit_probe(train, seed)
    return over_draws([probe.accuracy(test)]) | probe.chosen | {"labelled": len(train)}


def few_label_probe(
    train: Features, test: Features, labels_per_class: int, seed: int = 0, repeats: int = 10
) -> dict[str, Any]:
    """Linear probe on `labels_per_class` random labelled images per class: as `linear_probe`, with accuracy
    and deviation over `repeats` draws; converged is whether every fit did.

    The draws depend on the training labels and `seed` only, so that two encoders are compared on the same
    images. Features are standardized by the statistics of all training images, which need no label. Raises
    UsageError as `linear_probe` does, and if a class has too few training images.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> few_label_probe(features, features, labels_per_class=2, repeats=3)["draws"]
    [1.0, 1.0, 1.0]
    """
    labels, _ = require_labels("few_labels", train.labels, test.labels)
    train.require_finite("training images")
    test.require_finite("test images")
    mean, scale = standardization(train.features)
    generator = torch.Generator().manual_seed(seed)
    probes = []
    for _ in range(repeats):
        rows = draw_labelled(labels, labels_per_class, generator)
        inputs = (train.features[rows] - mean) / scale
        probes.append(_fit(inputs, labels[rows], FEW_LABEL_WEIGHT_DECAY, mean, scale))
    return over_draws([probe.accuracy(test) for probe in probes]) | {
        "weight_decay": FEW_LABEL_WEIGHT_DECAY,
        "labelled": len(rows),
        "converged": all(probe.chosen["converged"] for probe in probes),
    }


def label_fraction_probe(
    train: Features, test: Features, fraction: float, *, draws: int = 3, seed: int = 0
) -> dict[str, Any]:
    """The linear probe of `linear_probe` on random, stratified shares of the training labels: accuracy and
    deviation over draws, and how many labels each has seen.

    Nothing outside the share is used, its λ included: that is chosen on a fifth of the share. Draws depend on
    training labels and seed alone. Raises UsageError as `linear_probe` does.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> label_fraction_probe(features, features, 0.25)["labelled"]
    8
    """
    labels, _ = require_labels("label_fractions", train.labels, test.labels)
    generator = torch.Generator().manual_seed(seed)
    parts = [train.subset(draw_fraction(labels, fraction, generator)) for _ in range(draws)]
    return over_draws([linear_probe(part, test, seed)["accuracy"] for part in parts]) | {
        "fraction": fraction,
        "labelled": len(parts[0]),
    }


def over_draws(accuracies: list[float]) -> dict[str, Any]:
    """The accuracy of each draw, with their mean and standard deviation (n − 1; 0 for one).

    >>> over_draws([0.5])
    {'accuracy': 0.5, 'deviation': 0.0, 'draws': [0.5]}
    """
    deviation = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0
    return {"accuracy": float(np.mean(accuracies)), "deviation": deviation, "draws": accuracies}


def sigma_to_labels(
    train: Features, test: Features, probe: Probe | None = None, seed: int = 0
) -> dict[str, float]:
    """σ = mean KL(π* ‖ π_f), nats, with π* the one-hot labels and π_f the linear probe's probabilities on the
    frozen features: discriminability on the training images, which the probe was fitted on, generalisation
    on the test images, which it has not seen.

    A one-hot π* has no entropy, so σ is the probe's cross-entropy; 0 is a model that gives every image's
    class probability 1. "Explicitly Modeling Universality into Self-Supervised Learning", arXiv 2405.01053v4,
    evaluation universality. `probe` as from `fit_probe`, fitted here if not given. A low σ is not a high
    accuracy: print both. Raises UsageError as `linear_probe` does.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> sigma_to_labels(features, features)["generalisation"] < 0.01
    True
    """
    require_labels("sigma", train.labels, test.labels)
    test.require_finite("test images")
    probe = probe or fit_probe(train, seed)
    return {"discriminability": probe.cross_entropy(train), "generalisation": probe.cross_entropy(test)}


def fit_probe(train: Features, seed: int = 0, weight_decay: float | None = None) -> Probe:
    """Fit on all labelled training images; λ as given, or chosen on a fifth of them."""
    labels, _ = require_labels("linear", train.labels, train.labels)
    train.require_finite("training images")
    mean, scale = standardization(train.features)
    inputs = (train.features - mean) / scale
    if weight_decay is None:
        weight_decay = choose_weight_decay(inputs, labels, seed)
    return _fit(inputs, labels, weight_decay, mean, scale)


# Several tasks look at the probe on all labels of a row, one after the other.
shared_probe = lru_cache(maxsize=1)(fit_probe)


def choose_weight_decay(inputs: Tensor, labels: Tensor, seed: int) -> float:
    """λ of the lowest cross-entropy on a held-out, stratified fifth of standardized training features (N, F).

    Walks from strong to weak decay, each fit starting at the last, and stops after two that were worse than
    the best: weak decays are the slow fits. Cross-entropy rather than accuracy, because a few hundred images
    leave accuracies tied. Classes too small to give away a fifth leave nothing to validate on; the answer is
    then the constant of the few-label probe.
    """
    fitted, held = hold_out(labels, VALIDATION_FRACTION, torch.Generator().manual_seed(seed))
    if len(held) == 0:
        return FEW_LABEL_WEIGHT_DECAY
    coordinates, _ = _row_space(inputs)
    regression = _regression()
    columns = torch.searchsorted(labels[fitted].unique(), labels[held])
    found: dict[float, float] = {}
    for tried, weight_decay in enumerate(WEIGHT_DECAYS):
        weight, bias, _ = _solve(regression, coordinates[fitted], labels[fitted], weight_decay)
        logits = F.linear(coordinates[held], weight, bias)
        found[weight_decay] = F.cross_entropy(logits.double(), columns).item()
        best = min(found, key=found.__getitem__)
        if tried - WEIGHT_DECAYS.index(best) == 2:
            break
    return best


def _fit(inputs: Tensor, labels: Tensor, weight_decay: float, mean: Tensor, scale: Tensor) -> Probe:
    coordinates, basis = _row_space(inputs)
    weight, bias, converged = _solve(_regression(), coordinates, labels, weight_decay)
    if basis is not None:
        weight = weight @ basis.T
    chosen = {"weight_decay": weight_decay, "converged": converged}
    return Probe(mean, scale, labels.unique(), ((weight, bias),), chosen)


def _regression() -> LogisticRegression:
    # Tolerance 1e-5: at scikit-learn's 1e-4 a warm start does not move once λ falls below 1e-4
    # (measured, 50,000 × 512).
    return LogisticRegression(max_iter=MAX_ITERATIONS, tol=1e-5, warm_start=True)


def _solve(
    regression: LogisticRegression, inputs: Tensor, labels: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor, bool]:
    """Minimise mean cross-entropy + λ/2·‖W‖² from the weights of `regression` -> W (C, F), bias (C,), whether
    it converged.
    """
    binary = len(labels.unique()) == 2
    # scikit-learn keeps one row w for two classes. With rows ±w/2 our penalty is λ/4·‖w‖², half of its own.
    regression.set_params(C=(2 if binary else 1) / (weight_decay * len(inputs)))
    # One BLAS thread: products with C columns gain little from more, and on busy cores the threads wait for
    # each other (50,000 × 512 on two cores beside four other processes: 195 s with two threads, 20 s with
    # one; alone, 21 s with two).
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("always")
        regression.fit(inputs.numpy(), labels.numpy())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    weight, bias = torch.from_numpy(regression.coef_).float(), torch.from_numpy(regression.intercept_).float()
    if binary:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias, converged


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (F,) float32; 1 instead of the deviation where a column is
    constant.
    """
    deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
    # A constant float32 column (a border pixel) shows a deviation of rounding size, which would blow noise up
    # to unit variance.
    constant = deviation <= 1e-6 * mean.abs()
    return mean.float(), torch.where(constant, 1.0, deviation).float()


def _row_space(inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Inputs (N, F) in an orthonormal basis (F, R) of their rows -> (N, R), basis; unchanged, with None,
    where N >= F.

    The optimal weights lie in the span of the rows, and a rotation leaves ‖W‖² alone: the same probe, with R
    <= N columns instead of F.
    """
    if len(inputs) >= inputs.shape[1]:
        return inputs, None
    wide = inputs.double()
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.T)
    # Directions a millionth of the largest are rounding of float32 features.
    kept = eigenvalues > 1e-12 * eigenvalues[-1]
    basis = (wide.T @ vectors[:, kept] / eigenvalues[kept].sqrt()).float()
    return inputs @ basis, basis


def _measure_few_labels(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    each, draws = settings.labels_per_class, settings.few_label_draws
    return few_label_probe(features.train, features.test, each, seed, draws) | {"labels_per_class": each}


def _measure_fractions(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    drawn = {"draws": settings.fraction_draws, "seed": seed}
    return {
        "fractions": [
            label_fraction_probe(features.train, features.test, share, **drawn)
            for share in settings.label_fractions
        ]
    }


def _search_seconds(facts: DataFacts, settings: EvaluateConfig) -> float:
    labels, _ = facts.labels
    return SECONDS_PER_SEARCH * len(labels) * facts.width * len(labels.unique())


def _few_label_seconds(facts: DataFacts, settings: EvaluateConfig) -> float:
    classes = len(facts.labels[0].unique())
    labelled = settings.few_label_draws * settings.labels_per_class * classes
    return SECONDS_PER_FIT * labelled * facts.width * classes


register(
    EvaluationTask(
        "linear",
        lambda features, settings, seed: linear_probe(
            features.train, features.test, probe=shared_probe(features.train, seed)
        ),
        columns=lambda settings: [percent("linear")],
        place=(0, 0),
        default=True,
        transfer=True,
        seconds=_search_seconds,
    )
)
register(
    EvaluationTask(
        "few_labels",
        _measure_few_labels,
        columns=lambda settings: [Column(f"{settings.labels_per_class} labels\na class\n%", spread)],
        place=(0, 1),
        default=True,
        obstacle=lambda facts, settings: too_few_labels(facts.labels[0], settings.labels_per_class),
        seconds=_few_label_seconds,
    )
)
register(
    EvaluationTask(
        "sigma",
        lambda features, settings, seed: sigma_to_labels(
            features.train, features.test, shared_probe(features.train, seed)
        ),
        columns=lambda settings: [
            decimals("σ\ntrain", "discriminability", 3),
            decimals("σ\ntest", "generalisation", 3),
        ],
        place=(0, 3),
        default=True,
        seconds=_search_seconds,
    )
)
register(
    EvaluationTask(
        "label_fractions",
        _measure_fractions,
        columns=lambda settings: accuracies(
            [f"{100 * share:g} %\nlabels" for share in settings.label_fractions], "fractions"
        ),
        place=(1, 3),
    )
)
