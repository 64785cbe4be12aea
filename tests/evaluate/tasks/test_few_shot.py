import math
import statistics

import pytest
import torch

from fastgessl.config import UsageError
from fastgessl.evaluate import Features, few_shot


def literally(pool: Features, ways: int, shots: int, queries: int, episodes: int, seed: int) -> list[float]:
    """Prototypical episodes in plain Python loops: the same draws, every distance written out."""
    generator, accuracies = torch.Generator().manual_seed(seed), []
    members = [
        [i for i in range(len(pool)) if pool.labels[i] == label]
        for label in sorted(set(pool.labels.tolist()))
    ]
    members = [rows for rows in members if len(rows) >= shots + queries]
    points = [[value / math.hypot(*row) for value in row] for row in pool.features.double().tolist()]
    for _ in range(episodes):
        chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
        drawn = [
            [
                members[one][i]
                for i in torch.randperm(len(members[one]), generator=generator)[: shots + queries]
            ]
            for one in chosen
        ]
        means = [
            [statistics.fmean(column) for column in zip(*(points[i] for i in rows[:shots]), strict=True)]
            for rows in drawn
        ]
        hits = [
            min(range(ways), key=lambda way: math.dist(points[i], means[way])) == own
            for own, rows in enumerate(drawn)
            for i in rows[shots:]
        ]
        accuracies.append(statistics.fmean(hits))
    return accuracies


@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (3, 4), (5, 1)])
def test_episodes_equal_a_literal_implementation(cluster_features, ways, shots):
    pool = cluster_features(90, 6, 6, seed=0, spread=2.0)
    expected = literally(pool, ways, shots, 5, 12, seed=4)

    result = few_shot(pool, ways=ways, shots=shots, queries=5, episodes=12, seed=4)

    assert result["accuracy"] == pytest.approx(statistics.fmean(expected), abs=1e-12)
    assert result["interval"] == pytest.approx(1.96 * statistics.stdev(expected) / math.sqrt(12))
    assert len(set(expected)) > 1


def test_random_features_are_at_chance():
    pool = Features(
        torch.randn(400, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(400) % 20,
        torch.arange(400),
    )

    result = few_shot(pool, ways=5, shots=1, queries=15, episodes=200)

    assert abs(result["accuracy"] - 0.2) < 3 * result["interval"]


def test_classes_with_too_few_images_are_left_out(cluster_features):
    pool = cluster_features(60, 6, 3, seed=0)
    labels = pool.labels.clone()
    labels[0] = 9

    assert (
        few_shot(Features(pool.features, labels, pool.index), ways=3, shots=1, queries=5, episodes=5)[
            "classes"
        ]
        == 3
    )


@pytest.mark.parametrize(
    ("ways", "labelled", "message"),
    [(4, True, "only 3 classes have as many"), (2, False, "the images have no labels")],
)
def test_impossible_episodes_are_refused(cluster_features, ways, labelled, message):
    pool = cluster_features(60, 6, 3, seed=0)

    with pytest.raises(UsageError, match=f"Task few_shot: .*{message}"):
        few_shot(
            Features(pool.features, pool.labels if labelled else None, pool.index),
            ways=ways,
            shots=1,
            queries=15,
            episodes=2,
        )
