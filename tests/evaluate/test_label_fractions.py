from __future__ import annotations

import statistics

import pytest
import torch

from fastgessl.evaluate import Features, fit_probe, label_fraction_probe
from fastgessl.evaluate.label_fractions import draw_fraction
from fastgessl.evaluate.linear import score


def test_a_share_is_that_share_of_every_class_and_at_least_one_image():
    labels = torch.tensor([0] * 200 + [1] * 100 + [2] * 10)

    rows = draw_fraction(labels, 0.03, torch.Generator().manual_seed(0))

    assert labels[rows].bincount().tolist() == [6, 3, 1]
    assert len(rows.unique()) == len(rows)


def test_the_probe_sees_nothing_outside_its_share(cluster_features):
    train, test = (
        cluster_features(300, 10, 4, seed=0, spread=2.0),
        cluster_features(200, 10, 4, seed=1, spread=2.0),
    )
    rows = draw_fraction(train.labels, 0.1, torch.Generator().manual_seed(5))
    spoilt = train.features.clone()
    outside = torch.ones(300, dtype=torch.bool)
    outside[rows] = False
    spoilt[outside] = 1e6

    honest, other = (
        label_fraction_probe(Features(features, train.labels, train.index), test, 0.1, draws=1, seed=5)
        for features in (train.features, spoilt)
    )

    assert honest == other and honest.labelled == len(rows)
    assert honest.accuracy == score(fit_probe(train.subset(rows), 5), train.subset(rows), test).accuracy


def test_mean_and_deviation_are_over_the_draws(cluster_features):
    train, test = (
        cluster_features(300, 10, 4, seed=0, spread=3.0),
        cluster_features(200, 10, 4, seed=1, spread=3.0),
    )

    result = label_fraction_probe(train, test, 0.1, draws=3)

    assert len(set(result.draws)) > 1
    assert result.accuracy == pytest.approx(statistics.mean(result.draws))
    assert result.deviation == pytest.approx(statistics.stdev(result.draws))
