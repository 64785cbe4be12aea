from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import log_loss

from fastgessl.config import UsageError
from fastgessl.evaluate import Features, fit_probe, sigma_to_labels


def test_sigma_is_the_divergence_of_one_hot_labels_from_the_probes_probabilities(cluster_features):
    train, test = (
        cluster_features(150, 6, 5, seed=0, spread=2.0),
        cluster_features(90, 6, 5, seed=1, spread=2.0),
    )
    probe = fit_probe(train)
    logits = (
        (test.features - probe.mean) / probe.scale
    ).double().numpy() @ probe.weight.double().numpy().T + probe.bias.double().numpy()
    probabilities = softmax(logits, axis=1)
    one_hot = np.eye(5)[test.labels.numpy()]

    measured = sigma_to_labels(train, test, probe).generalisation

    assert 0.1 < measured < 5
    assert measured == pytest.approx(rel_entr(one_hot, probabilities).sum(axis=1).mean(), rel=1e-5)
    assert measured == pytest.approx(log_loss(test.labels.numpy(), probabilities), rel=1e-5)


def test_sigma_discriminability_is_measured_on_the_training_images(cluster_features):
    train, test = (
        cluster_features(150, 6, 5, seed=0, spread=2.0),
        cluster_features(90, 6, 5, seed=1, spread=2.0),
    )
    probe = fit_probe(train)

    assert (
        sigma_to_labels(train, test, probe).discriminability
        == sigma_to_labels(train, train, probe).generalisation
    )
    assert (
        sigma_to_labels(train, test, probe).discriminability
        < sigma_to_labels(train, test, probe).generalisation
    )


def test_sigma_of_features_that_say_nothing_is_the_entropy_of_the_classes():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    nothing = Features(torch.ones(100, 4), labels, torch.arange(100))
    entropy = -sum(share * math.log(share) for share in (0.6, 0.3, 0.1))

    assert sigma_to_labels(nothing, nothing).generalisation == pytest.approx(entropy, abs=1e-4)


def test_sigma_of_a_confident_mistake_is_finite():
    train = Features(
        torch.tensor([[-1.0], [1.0]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20), torch.arange(40)
    )
    far = Features(torch.tensor([[1e4]]), torch.tensor([0]), torch.arange(1))

    measured = sigma_to_labels(train, far).generalisation

    assert 1e3 < measured < math.inf


def test_sigma_refuses_data_without_labels():
    nothing = Features(torch.ones(4, 2), None, torch.arange(4))

    with pytest.raises(UsageError, match="Task sigma: the training images have no labels"):
        sigma_to_labels(nothing, nothing)
