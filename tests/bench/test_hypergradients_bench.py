"""The likeness of the modes is measured as the page says."""

from __future__ import annotations

import json

import pytest

from bench import hypergradients, report
from bench.studies import with_options


@pytest.fixture(scope="module")
def measured():
    """Of one α, on the narrowest network."""
    config = with_options(
        "digits-simclr",
        {"train.batch_size": 8, "train.device": "cpu", "log.trackers": (), "model.width": 0.125},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypergradients, "ALPHAS", (0.1,))
        patch.setattr(hypergradients, "CASES", {"float32": (("head", 1),), "float64": (("all", 1),)})
        patch.setattr(hypergradients, "TRIED_RADII", {"float32": (5e-3, 1e-4), "float64": (1e-5,)})
        return hypergradients.measure(config, range(2), steps=2)


def test_every_network_precision_and_case_is_a_row_with_statistics_over_seeds(measured):
    cases = [(row["network"], row["precision"], row["scope"], row["alpha"]) for row in measured["rows"]]
    assert cases == [
        (network, *case)
        for network in ("ReLU", "GELU")
        for case in (("float32", "head", 0.1), ("float64", "all", 0.1))
    ]
    assert all(row["first_order, cosine"]["deviation"] > 0 for row in measured["rows"])
    json.dumps(measured, allow_nan=False)


def test_what_is_exact_in_float64_has_cosine_and_norm_1_and_first_order_has_not(measured):
    for row in measured["rows"]:
        if row["precision"] == "float64":
            assert row["finite_difference, cosine"]["mean"] == pytest.approx(1, abs=1e-5)
            assert row["finite_difference, norm"]["mean"] == pytest.approx(1, abs=1e-5)
            assert row["first_order, cosine"]["mean"] < 0.99


def test_the_radius_that_is_named_is_the_one_that_is_taken(measured):
    found = {
        (row["network"], row["radius"]): row["finite_difference, cosine"]["mean"] for row in measured["radii"]
    }
    # On a smooth network the smaller one is nearer in either precision; float64 across kinks is not near at
    # all.
    assert (
        found["GELU", 5e-3] < found["GELU", 1e-4]
        and found["GELU", 1e-5] > 0.999999
        and found["ReLU", 1e-5] < 0.99
    )


def test_the_page_shows_both_tables(measured):
    (_, modes), (title, radii) = report.tables(report._with_spreads(measured))
    assert title == "radii" and "±" in modes[0]["first_order, norm"] and len(radii) == 6
