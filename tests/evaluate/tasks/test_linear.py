import math
import statistics

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate import (
    Features,
    few_label_probe,
    fit_probe,
    label_fraction_probe,
    linear_probe,
    sigma_to_labels,
)
from fastgessl.evaluate.sources import draw_fraction, draw_labelled, hold_out
from fastgessl.evaluate.tasks import linear


def optimum(
    inputs: torch.Tensor, labels: torch.Tensor, classes: int, weight_decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias that minimise mean cross-entropy + λ/2·‖W‖², by torch's L-BFGS in float64."""
    weight = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        loss = (
            F.cross_entropy(F.linear(inputs, weight, bias), labels) + weight_decay / 2 * weight.square().sum()
        )
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def standardised(features: Features, by: Features) -> torch.Tensor:
    return torch.from_numpy(
        StandardScaler().fit(by.features.double().numpy()).transform(features.features.double().numpy())
    )


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize(("count", "width"), [(120, 10), (40, 90)], ids=["N>F", "F>N"])
@pytest.mark.parametrize("weight_decay", [1.0, 0.01])
def test_probe_minimises_mean_cross_entropy_plus_half_lambda_squared_weights(
    cluster_features, classes, count, width, weight_decay
):
    train, test = (
        cluster_features(count, width, classes, seed=0, spread=2.0),
        cluster_features(50, width, classes, seed=1, spread=2.0),
    )
    weight, bias = optimum(standardised(train, by=train), train.labels, classes, weight_decay)
    expected = F.log_softmax(F.linear(standardised(test, by=train), weight, bias), dim=1)

    probe = fit_probe(train, weight_decay=weight_decay)

    assert probe.chosen["converged"]
    torch.testing.assert_close(probe.log_probabilities(test.features), expected, rtol=2e-3, atol=5e-3)


def test_linear_probe_chooses_the_decay_of_the_lowest_validation_cross_entropy(cluster_features):
    train, chosen = cluster_features(150, 20, 5, seed=0, spread=2.0), set()
    inputs = standardised(train, by=train)
    for seed in (0, 1):
        fitted, held = hold_out(train.labels, 0.2, torch.Generator().manual_seed(seed))
        cross_entropy = {}
        for weight_decay in linear.WEIGHT_DECAYS:
            weight, bias = optimum(inputs[fitted], train.labels[fitted], 5, weight_decay)
            cross_entropy[weight_decay] = F.cross_entropy(
                F.linear(inputs[held], weight, bias), train.labels[held]
            ).item()
        best = min(cross_entropy, key=cross_entropy.__getitem__)
        chosen.add(best)

        assert linear_probe(train, train, seed=seed)["weight_decay"] == best

    assert len(chosen) > 1 and not chosen & {linear.WEIGHT_DECAYS[0], linear.WEIGHT_DECAYS[-1]}


def test_linear_probe_refits_on_all_training_images(cluster_features):
    train, test = (
        cluster_features(150, 20, 5, seed=0, spread=3.0),
        cluster_features(100, 20, 5, seed=1, spread=3.0),
    )
    result = linear_probe(train, test)

    probe = fit_probe(train, weight_decay=result["weight_decay"])

    assert result["labelled"] == 150
    assert (
        result["accuracy"]
        == (probe.log_probabilities(test.features).argmax(dim=1) == test.labels).double().mean().item()
    )


def test_classes_too_small_to_validate_on_take_the_documented_constant():
    two_each = Features(
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.arange(6),
    )

    assert fit_probe(two_each).chosen["weight_decay"] == linear.FEW_LABEL_WEIGHT_DECAY


def test_few_label_probe_equals_a_literal_loop_over_draws(cluster_features):
    train, test = (
        cluster_features(200, 30, 4, seed=0, spread=3.0),
        cluster_features(150, 30, 4, seed=1, spread=3.0),
    )
    inputs, test_inputs, generator, accuracies = (
        standardised(train, train),
        standardised(test, train),
        torch.Generator().manual_seed(7),
        [],
    )
    for _ in range(4):
        rows = draw_labelled(train.labels, 5, generator)
        weight, bias = optimum(inputs[rows], train.labels[rows], 4, linear.FEW_LABEL_WEIGHT_DECAY)
        accuracies.append(
            (F.linear(test_inputs, weight, bias).argmax(dim=1) == test.labels).double().mean().item()
        )

    result = few_label_probe(train, test, labels_per_class=5, seed=7, repeats=4)

    assert result["draws"] == pytest.approx(accuracies, abs=1 / 150 + 1e-9)
    assert result["accuracy"] == pytest.approx(statistics.mean(result["draws"]))
    assert result["deviation"] == pytest.approx(statistics.stdev(result["draws"]))
    assert result["labelled"] == 20
    assert len(set(result["draws"])) > 1


def test_labels_need_be_neither_contiguous_nor_from_zero(cluster_features):
    train, test = cluster_features(90, 8, 3, seed=0), cluster_features(60, 8, 3, seed=1)
    names = torch.tensor([70, -2, 9])
    renamed = [Features(part.features, names[part.labels], part.index) for part in (train, test)]

    assert linear_probe(*renamed)["accuracy"] == linear_probe(train, test)["accuracy"] > 0.8


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5])
def test_a_constant_feature_changes_nothing(cluster_features, value):
    train, test = (
        cluster_features(90, 8, 3, seed=0, spread=2.0),
        cluster_features(60, 8, 3, seed=1, spread=2.0),
    )
    padded = [
        Features(
            torch.cat([part.features, torch.full((len(part), 3), value)], dim=1), part.labels, part.index
        )
        for part in (train, test)
    ]

    plain, wide = fit_probe(train, weight_decay=0.1), fit_probe(padded[0], weight_decay=0.1)

    torch.testing.assert_close(
        wide.log_probabilities(padded[1].features),
        plain.log_probabilities(test.features),
        rtol=1e-3,
        atol=1e-3,
    )


def test_probe_says_when_it_did_not_converge(cluster_features, monkeypatch):
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 2)
    train = cluster_features(90, 8, 3, seed=0, spread=2.0)

    assert not fit_probe(train, weight_decay=1e-4).chosen["converged"]


@pytest.mark.parametrize(
    "probe",
    [linear_probe, lambda *splits: few_label_probe(*splits, labels_per_class=1)],
    ids=["linear", "few_labels"],
)
def test_probes_refuse_what_allows_no_classifier(cluster_features, probe):
    good = cluster_features(20, 4, 2, seed=0)
    unlabelled = Features(good.features, None, good.index)
    one_class = Features(good.features, torch.zeros(20, dtype=torch.int64), good.index)
    broken = Features(good.features.log() * float("inf"), good.labels, good.index)

    for train, test, message in [
        (unlabelled, good, "no labels"),
        (good, unlabelled, "no labels"),
        (one_class, one_class, "of class 0"),
        (good, cluster_features(20, 4, 3, seed=1), "have no training image"),
        (broken, good, "training images: .* NaN or infinite"),
        (good, broken, "test images: .* NaN or infinite"),
    ]:
        with pytest.raises(UsageError, match=message):
            probe(train, test)


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

    assert honest == other and honest["labelled"] == len(rows)
    assert honest["accuracy"] == linear_probe(train.subset(rows), test, 5)["accuracy"]


def test_sigma_is_the_divergence_of_one_hot_labels_from_the_probes_probabilities(cluster_features):
    train, test = (
        cluster_features(150, 6, 5, seed=0, spread=2.0),
        cluster_features(90, 6, 5, seed=1, spread=2.0),
    )
    probe = fit_probe(train)
    ((weight, bias),) = probe.layers
    logits = (
        (test.features - probe.mean) / probe.scale
    ).double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    probabilities = softmax(logits, axis=1)
    one_hot = np.eye(5)[test.labels.numpy()]

    measured = sigma_to_labels(train, test, probe)["generalisation"]

    assert 0.1 < measured < 5
    assert measured == pytest.approx(rel_entr(one_hot, probabilities).sum(axis=1).mean(), rel=1e-5)
    assert measured == pytest.approx(log_loss(test.labels.numpy(), probabilities), rel=1e-5)


def test_sigma_of_features_that_say_nothing_is_the_entropy_of_the_classes():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    nothing = Features(torch.ones(100, 4), labels, torch.arange(100))
    entropy = -sum(share * math.log(share) for share in (0.6, 0.3, 0.1))

    assert sigma_to_labels(nothing, nothing)["generalisation"] == pytest.approx(entropy, abs=1e-4)


def test_sigma_of_a_confident_mistake_is_finite():
    train = Features(
        torch.tensor([[-1.0], [1.0]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20), torch.arange(40)
    )
    far = Features(torch.tensor([[1e4]]), torch.tensor([0]), torch.arange(1))

    measured = sigma_to_labels(train, far)["generalisation"]

    assert 1e3 < measured < math.inf
