"""σ as a measurement: how far a frozen model's distribution over a labelled task is from the labels'."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastgessl.evaluate.features import Features
from fastgessl.evaluate.linear import LinearProbe, fit_probe
from fastgessl.evaluate.splits import require_labels


@dataclass(frozen=True)
class Sigma:
    """σ-measurement of one task, in nats; 0 is a model that gives every image's class probability 1."""

    discriminability: float
    """On the training images of the task's classes, which the probe was fitted on."""
    generalisation: float
    """On the test images, which it has not seen."""


def sigma_to_labels(
    train: Features, test: Features, probe: LinearProbe | None = None, seed: int = 0
) -> Sigma:
    """σ = mean KL(π* ‖ π_f), with π* the one-hot labels and π_f the linear probe's probabilities on the
    frozen features.

    A one-hot π* has no entropy, so σ is the probe's cross-entropy. "Explicitly Modeling Universality into
    Self-Supervised Learning", arXiv 2405.01053v4, evaluation universality. `probe` as from `fit_probe`,
    fitted here if not given. A low σ is not a high accuracy: print both. Raises UsageError as `linear_probe`
    does.

    >>> import torch
    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> sigma_to_labels(features, features).generalisation < 0.01
    True
    """
    labels, test_labels = require_labels("sigma", train.labels, test.labels)
    test.require_finite("test images")
    probe = fit_probe(train, seed) if probe is None else probe
    return Sigma(_divergence(probe, train.features, labels), _divergence(probe, test.features, test_labels))


def _divergence(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    return -probe.log_probabilities(features).gather(1, probe.columns(labels)[:, None]).mean().item()
