import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from fastgessl.config import UsageError
from fastgessl.evaluate import Features, Neighbours, knn_classify, knn_protocols
from fastgessl.evaluate.tasks import knn


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 0.5)])
def test_knn_equals_scikit_learns_weighted_cosine_neighbours(cluster_features, k, temperature):
    train, test = (
        cluster_features(200, 12, 5, seed=0, spread=2.0),
        cluster_features(120, 12, 5, seed=1, spread=2.0),
    )
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    oracle.fit(train.features.double().numpy(), train.labels.numpy())

    expected = oracle.score(test.features.double().numpy(), test.labels.numpy())

    assert 0.3 < expected < 0.999
    assert knn_classify(train, test, k, temperature) == pytest.approx(expected, abs=1e-12)


def test_knn_does_not_depend_on_the_chunk(cluster_features, monkeypatch):
    train, test = (
        cluster_features(60, 8, 4, seed=0, spread=2.0),
        cluster_features(50, 8, 4, seed=1, spread=2.0),
    )
    whole = knn_classify(train, test, 7, 0.1)
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 3 * 60)

    assert knn_classify(train, test, 7, 0.1) == whole


def test_knn_at_a_tiny_temperature_is_the_nearest_neighbour_and_overflows_nowhere(cluster_features):
    train, test = (
        cluster_features(60, 8, 4, seed=0, spread=2.0),
        cluster_features(50, 8, 4, seed=1, spread=2.0),
    )

    assert knn_classify(train, test, 20, 1e-6) == knn_classify(train, test, 1, 0.07)


def test_knn_refuses_more_neighbours_than_training_images(cluster_features):
    train = cluster_features(10, 4, 2, seed=0)

    with pytest.raises(UsageError, match=r"knn_k is 11, but there are only 10 training images"):
        knn_classify(train, train, 11, 0.07)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_published_protocols_equal_scikit_learns(cluster_features, metric, k):
    train, test = (
        cluster_features(200, 12, 5, seed=0, spread=2.0),
        cluster_features(120, 12, 5, seed=1, spread=2.0),
    )
    temperature = 0.1 if metric == "cosine" else 0.0
    weights = (lambda distance: np.exp((1 - distance) / temperature)) if temperature else "uniform"
    oracle = KNeighborsClassifier(k, metric=metric, algorithm="brute", weights=weights)
    oracle.fit(train.features.double().numpy(), train.labels.numpy())
    protocol = Neighbours(metric, k, temperature)

    found = knn_protocols(train, test, (protocol, Neighbours("cosine", 2, 0.5)))

    assert list(found) == [protocol, Neighbours("cosine", 2, 0.5)]
    assert found[protocol] == pytest.approx(
        oracle.score(test.features.double().numpy(), test.labels.numpy()), abs=1e-12
    )


def test_protocols_that_share_a_search_give_what_each_gives_alone(cluster_features):
    train, test = (
        cluster_features(250, 8, 4, seed=0, spread=2.0),
        cluster_features(60, 8, 4, seed=1, spread=2.0),
    )

    found = knn_protocols(train, test)

    assert set(found) == set(knn.PUBLISHED)
    for protocol in knn.PUBLISHED[:2]:
        assert found[protocol] == knn_classify(train, test, protocol.k, protocol.temperature)
    assert len(set(found.values())) > 1


def test_euclidean_distances_keep_their_digits_far_from_the_origin(cluster_features):
    train, test = (
        cluster_features(200, 12, 5, seed=0, spread=2.0),
        cluster_features(120, 12, 5, seed=1, spread=2.0),
    )
    near, far = (
        [
            Features(part.features.double().add(shift).float(), part.labels, part.index)
            for part in (train, test)
        ]
        for shift in (0, 5000)
    )
    protocol = Neighbours("euclidean", 5)

    assert knn_protocols(*far, (protocol,))[protocol] == pytest.approx(
        knn_protocols(*near, (protocol,))[protocol], abs=0.02
    )
