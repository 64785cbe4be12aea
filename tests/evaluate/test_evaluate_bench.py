"""The measuring program compares like with like: three implementations of one k-NN, and two probes, on the
same features.
"""

from __future__ import annotations

import pytest

bench = pytest.importorskip("bench.evaluate", reason="lightly, a peer of the measurements, is not installed")


def test_three_implementations_of_k_nn_agree():
    measured = bench.neighbours(bench.clusters(400, seed=0), bench.clusters(100, seed=1))

    assert (
        measured["knn_accuracy"]
        == measured["knn_sklearn_accuracy"]
        == pytest.approx(measured["knn_lightly_accuracy"], abs=0.011)
    )
    assert 0.15 < measured["knn_accuracy"] < 0.95


def test_the_probe_and_scikit_learns_reach_the_same_accuracy():
    measured = bench.probes(bench.clusters(3000, seed=0), bench.clusters(500, seed=1))

    assert measured["probe_accuracy"] == pytest.approx(measured["sklearn_accuracy"], abs=0.08)
    assert measured["probe_learning_rates"] == 8


def test_extraction_is_compared_with_the_bare_forward_on_the_same_images():
    measured = bench.extraction(16, rounds=1)

    assert measured["extraction_share"] > 0.2
    assert measured["extraction_share"] == measured["extraction_shares"][0]
