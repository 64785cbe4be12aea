"""Linear probes: multinomial logistic regression on standardised frozen features, with all labels or with a
few a class.

The probe minimises  mean cross-entropy + λ/2·‖W‖²  by L-BFGS (scikit-learn); the bias is free. λ, the weight
decay, is the only choice to make. With all labels it is made on a fifth of the training images; with a few
labels it is a constant. Labels of test images are read by `score` alone, once everything is fixed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from fastgessl.evaluate.features import Features
from fastgessl.evaluate.splits import draw_labelled, hold_out, require_labels

WEIGHT_DECAYS = tuple(10.0**power for power in range(1, -7, -1))
VALIDATION_FRACTION = 0.2
# What five-fold cross-validation within ten labels a class chose most often: 19 of 30 draws (digits; raw
# pixels, a SimCLR and a BYOL encoder), and scikit-learn's default strength at 100 images. The search itself
# costs 40 times as much and reached the same accuracy within 0.1 points on each.
FEW_LABEL_WEIGHT_DECAY = 0.01
MAX_ITERATIONS = 500


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: features (N, F) -> log-probabilities (N, C)."""

    mean: Tensor
    """(F,) float32, of the training features."""
    scale: Tensor
    """(F,) float32, standard deviation of the training features; 1 where a feature is constant."""
    weight: Tensor
    """(C, F) float32, on standardised features."""
    bias: Tensor
    """(C,) float32."""
    classes: Tensor
    """(C,) int64, the label that each output stands for, increasing."""
    weight_decay: float
    """λ."""
    converged: bool
    """Whether L-BFGS met its tolerance within its iterations."""

    def log_probabilities(self, features: Tensor) -> Tensor:
        """(N, F) float32 -> (N, C) float64. In float64, so that a confident mistake costs its finite price
        instead of infinity.
        """
        return F.log_softmax(
            F.linear((features - self.mean) / self.scale, self.weight, self.bias).double(), dim=1
        )

    def columns(self, labels: Tensor) -> Tensor:
        """Labels (N,) -> the output that stands for each, (N,)."""
        return torch.searchsorted(self.classes, labels)


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reaches on the test images."""

    accuracy: float
    """Share of test images classified correctly; the mean over draws if there are several."""
    deviation: float
    """Standard deviation (n − 1) of the accuracy over draws; 0 for a single probe."""
    draws: tuple[float, ...]
    """Accuracy of each draw."""
    weight_decay: float
    """λ that was used."""
    labelled: int
    """Training images whose labels each probe saw."""
    converged: bool
    """Whether every fit met its tolerance."""


def linear_probe(train: Features, test: Features, seed: int = 0) -> ProbeResult:
    """Linear probe on all labels; λ by validation cross-entropy on a fifth of the training images, then
    refitted on all of them.

    Raises UsageError without labels, with one class, for test classes that the training images lack, or for
    NaN features.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> linear_probe(features, features).accuracy
    1.0
    """
    require_labels("linear", train.labels, test.labels)
    return score(fit_probe(train, seed), train, test)


def score(probe: LinearProbe, train: Features, test: Features) -> ProbeResult:
    """Accuracy of a fitted probe on labelled test images."""
    _, labels = require_labels("linear", train.labels, test.labels)
    test.require_finite("test images")
    accuracy = _accuracy(probe, test.features, labels)
    return ProbeResult(accuracy, 0.0, (accuracy,), probe.weight_decay, len(train), probe.converged)


def few_label_probe(
    train: Features,
    test: Features,
    labels_per_class: int,
    seed: int = 0,
    repeats: int = 10,
    weight_decay: float = FEW_LABEL_WEIGHT_DECAY,
) -> ProbeResult:
    """Linear probe on `labels_per_class` random labelled images a class: mean and standard deviation over
    `repeats` draws.

    The draws depend on the training labels and `seed` only, so that two encoders are compared on the same
    images. Features are standardised by the statistics of all training images, which need no label. Raises
    UsageError as `linear_probe` does, and if a class has too few training images.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> few_label_probe(features, features, labels_per_class=2, repeats=3).draws
    (1.0, 1.0, 1.0)
    """
    labels, test_labels = require_labels("few_labels", train.labels, test.labels)
    train.require_finite("training images")
    test.require_finite("test images")
    mean, scale = standardisation(train.features)
    generator = torch.Generator().manual_seed(seed)
    probes = []
    for _ in range(repeats):
        rows = draw_labelled(labels, labels_per_class, generator)
        probes.append(_fit((train.features[rows] - mean) / scale, labels[rows], weight_decay, mean, scale))
    draws = tuple(_accuracy(probe, test.features, test_labels) for probe in probes)
    deviation = float(np.std(draws, ddof=1)) if repeats > 1 else 0.0
    return ProbeResult(
        float(np.mean(draws)),
        deviation,
        draws,
        weight_decay,
        len(rows),
        all(probe.converged for probe in probes),
    )


def fit_probe(train: Features, seed: int = 0, weight_decay: float | None = None) -> LinearProbe:
    """Fit on all labelled training images; λ as given, or chosen on a fifth of them."""
    labels, _ = require_labels("linear", train.labels, train.labels)
    train.require_finite("training images")
    mean, scale = standardisation(train.features)
    inputs = (train.features - mean) / scale
    if weight_decay is None:
        weight_decay = choose_weight_decay(inputs, labels, seed)
    return _fit(inputs, labels, weight_decay, mean, scale)


def choose_weight_decay(inputs: Tensor, labels: Tensor, seed: int) -> float:
    """λ of the lowest cross-entropy on a held-out, stratified fifth of standardised training features (N, F).

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
    best, lowest, worse = WEIGHT_DECAYS[0], float("inf"), 0
    for weight_decay in WEIGHT_DECAYS:
        weight, bias, _ = _solve(regression, coordinates[fitted], labels[fitted], weight_decay)
        columns = torch.searchsorted(torch.from_numpy(regression.classes_), labels[held])
        cross_entropy = F.cross_entropy(F.linear(coordinates[held], weight, bias).double(), columns).item()
        if cross_entropy < lowest:
            best, lowest, worse = weight_decay, cross_entropy, 0
        else:
            worse += 1
        if worse == 2:
            break
    return best


def _fit(inputs: Tensor, labels: Tensor, weight_decay: float, mean: Tensor, scale: Tensor) -> LinearProbe:
    coordinates, basis = _row_space(inputs)
    regression = _regression()
    weight, bias, converged = _solve(regression, coordinates, labels, weight_decay)
    if basis is not None:
        weight = weight @ basis.T
    return LinearProbe(
        mean, scale, weight, bias, torch.from_numpy(regression.classes_), weight_decay, converged
    )


def _regression() -> LogisticRegression:
    # Tolerance 1e-5: at scikit-learn's 1e-4 a warm start stops where it stands once λ falls below 1e-4
    # (measured, 50,000 × 512).
    return LogisticRegression(max_iter=MAX_ITERATIONS, tol=1e-5, warm_start=True)


def _solve(
    regression: LogisticRegression, inputs: Tensor, labels: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor, bool]:
    """Minimise mean cross-entropy + λ/2·‖W‖² from where `regression` stands -> W (C, F), bias (C,), whether
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


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
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


def _accuracy(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    predicted = probe.classes[probe.log_probabilities(features).argmax(dim=1)]
    return (predicted == labels).double().mean().item()
