import math

import pytest
import torch
from scipy.spatial.distance import pdist
from torch.nn import functional as F

from fastgessl.evaluate import (
    alignment,
    crowding_ratio,
    effective_rank,
    measure_geometry,
    uniformity,
    view_retrieval,
)
from fastgessl.evaluate.tasks import geometry


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("singular", [[1.0] * 5, [4.0, 2.0, 1.0, 1.0], [3.0]])
def test_effective_rank_is_the_perplexity_of_the_given_singular_values(shape, singular):
    left, right = (
        torch.linalg.qr(random(shape[0], len(singular))).Q,
        torch.linalg.qr(random(shape[1], len(singular), seed=1)).Q,
    )
    shares = [value / sum(singular) for value in singular]

    measured = effective_rank(left * torch.tensor(singular) @ right.T)

    assert measured == pytest.approx(math.prod(share**-share for share in shares), rel=1e-4)


def test_effective_rank_of_collapsed_features_is_one_and_of_dead_ones_zero():
    assert effective_rank(torch.ones(20, 8)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(20, 8)) == 0


def test_alignment_of_views_turned_by_an_angle_is_two_minus_two_cosines():
    angle, start = 0.3, torch.linspace(0, 6, 25)
    first = torch.stack([start.cos(), start.sin()], dim=1)
    second = 7 * torch.stack([(start + angle).cos(), (start + angle).sin()], dim=1)

    assert alignment(first, second) == pytest.approx(2 - 2 * math.cos(angle), rel=1e-5)


def test_uniformity_of_antipodes_is_minus_eight_and_of_a_collapse_zero():
    assert uniformity(torch.tensor([[2.0, 0.0], [-5.0, 0.0]])) == pytest.approx(-8)
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0)


def test_uniformity_equals_the_mean_over_scipys_pairs(monkeypatch):
    features = random(50, 7)
    monkeypatch.setattr(geometry, "PAIRS_AT_ONCE", 7 * 50)
    squared = pdist(F.normalize(features.double(), dim=1).numpy(), "sqeuclidean")

    assert uniformity(features) == pytest.approx(
        math.log(sum(math.exp(-2 * value) for value in squared) / len(squared)), rel=1e-9
    )


def test_view_retrieval_equals_a_literal_loop(monkeypatch):
    first = random(60, 4)
    second = first + 0.7 * random(60, 4, seed=1)
    monkeypatch.setattr(geometry, "PAIRS_AT_ONCE", 11 * 60)
    hits = 0
    for i in range(60):
        similarities = [
            F.cosine_similarity(first[i].double(), second[j].double(), dim=0).item() for j in range(60)
        ]
        hits += max(range(60), key=similarities.__getitem__) == i

    assert 5 < hits < 55
    assert view_retrieval(first, second) == hits / 60


def test_view_retrieval_of_a_collapse_is_chance():
    assert view_retrieval(torch.ones(50, 4), torch.ones(50, 4)) == 1 / 50


def test_geometry_averages_both_views_and_both_directions():
    first, second = random(30, 5), random(30, 5) + 0.8 * random(30, 5, seed=1)

    measured = measure_geometry(first, second)

    assert measured["uniformity"] == pytest.approx((uniformity(first) + uniformity(second)) / 2)
    assert measured["retrieval"] == (view_retrieval(first, second) + view_retrieval(second, first)) / 2
    assert view_retrieval(first, second) != view_retrieval(second, first)
    assert (measured["effective_rank"], measured["alignment"], measured["images"]) == (
        effective_rank(first),
        alignment(first, second),
        30,
    )


def test_crowding_ratio_of_two_pairs_on_the_circle_has_its_closed_form():
    # Pairs at ±a around two axes: centres cos a from the origin and √2·cos a apart, each point sin a from its
    # own.
    a = 0.2
    angles = torch.tensor([-a, a, math.pi / 2 - a, math.pi / 2 + a])

    measured = crowding_ratio(torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([4, 4, 9, 9]))

    assert measured == pytest.approx(math.tan(a) / math.sqrt(2), rel=1e-5)


def test_crowding_ratio_takes_the_nearest_other_class():
    a = 0.2
    angles = torch.tensor([-a, a, math.pi / 2 - a, math.pi / 2 + a, math.pi - a, math.pi + a])
    near, far = math.sqrt(2) * math.cos(a), 2 * math.cos(a)

    measured = crowding_ratio(
        torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 0, 1, 1, 2, 2])
    )

    assert near < far
    assert measured == pytest.approx(math.sin(a) / near, rel=1e-5)


def test_crowding_ratio_of_classes_with_one_centre_is_infinite():
    assert crowding_ratio(torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])) == math.inf
