import pytest
import torch
from scipy.stats import entropy
from torch.nn import functional as F

from fastgessl.evaluate import Features, SgdProtocol, fit_gradient_probe, fit_probe
from fastgessl.evaluate.tasks.universality import (
    choose_probe,
    kl_divergence,
    summed,
    task_sigma,
)


def log_probabilities(seed: int, rows: int = 20, classes: int = 4) -> torch.Tensor:
    return torch.randn(
        rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).log_softmax(dim=1)


def test_sigma_equals_scipys_relative_entropy():
    target, model = log_probabilities(0), log_probabilities(1)

    expected = sum(entropy(target[i].exp().numpy(), model[i].exp().numpy()) for i in range(20)) / 20

    assert kl_divergence(target, model) == pytest.approx(expected, rel=1e-12)


def test_sigma_of_a_model_against_itself_is_zero(cluster_features):
    images = cluster_features(200, 8, 4, seed=0, spread=2.0)
    probe = fit_probe(images, weight_decay=0.1)

    found = task_sigma(
        "clusters", "generalisation", images, probe, "linear", probe.log_probabilities(images.features)
    )

    assert found["sigma"] == 0 and found["target"] == "supervised"
    assert 0.3 < found["accuracy"] < 1


@pytest.mark.parametrize("hidden", [0, 16])
def test_sigma_against_one_hot_labels_is_the_cross_entropy(cluster_features, hidden):
    images = cluster_features(200, 8, 4, seed=0, spread=2.0)
    probe = fit_gradient_probe(images, SgdProtocol(hidden, epochs=5, rates=(0.05,)))

    found = task_sigma("clusters", "discriminability", images, probe, "mlp" if hidden else "linear")

    assert found["sigma"] == pytest.approx(
        F.cross_entropy(probe.log_probabilities(images.features), images.labels).item(), rel=1e-12
    )
    assert found["target"] == "labels" and found["images"] == 200


def test_labels_that_are_not_numbered_from_zero_count_the_same(cluster_features):
    images = cluster_features(200, 8, 4, seed=0, spread=2.0)
    renamed = Features(images.features, images.labels * 10 + 3, images.index)

    sigmas = [
        task_sigma("x", "generalisation", part, fit_probe(part, weight_decay=0.1), "linear")["sigma"]
        for part in (images, renamed)
    ]

    assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-6)


def test_a_target_without_doubt_costs_nothing_where_it_gives_no_probability():
    certain = torch.eye(2).log()

    assert kl_divergence(certain, certain) == 0
    assert kl_divergence(certain, torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()) == pytest.approx(
        0.693147, abs=1e-6
    )


def test_the_probe_is_the_one_of_the_lower_validation_cross_entropy():
    points = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    bent = Features(points, (points[:, 0] * points[:, 1] > 0).long(), torch.arange(600))
    straight = Features(
        points,
        (points[:, 0] > 0.5 * torch.randn(600, generator=torch.Generator().manual_seed(1))).long(),
        torch.arange(600),
    )

    assert choose_probe(bent, SgdProtocol(hidden=32, epochs=40))[0] == "mlp"
    assert choose_probe(straight, SgdProtocol(hidden=32, epochs=2))[0] == "linear"


def test_sums_are_by_group_and_over_all():
    def task(group: str, sigma: float) -> dict:
        return {"group": group, "sigma": sigma}

    found = summed(
        [
            task("discriminability", 0.1),
            task("generalisation", 0.2),
            task("transferability", 0.3),
            task("transferability", 0.4),
        ]
    )

    assert found["groups"] == pytest.approx(
        {"discriminability": 0.1, "generalisation": 0.2, "transferability": 0.7}
    )
    assert found["total"] == pytest.approx(1.0)
