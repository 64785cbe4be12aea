import statistics
from pathlib import Path

import pytest
from scipy import stats

from fastgessl.config import Config
from fastgessl.report.records import Record, comparison_table, kinds_of, paired_difference


def record(seed: int, knn: float, w_sigma: float = 0.0, **train: object) -> Record:
    config = Config(recipe="digits-simclr")
    changed = {
        "train": config.train.model_copy(update={"seed": seed, **train}),
        "gessl": config.gessl.model_copy(update={"w_sigma": w_sigma}),
    }
    evaluation = {"rows": {"raw pixels": {"knn": {"accuracy": 0.1}}, "this run": {"knn": {"accuracy": knn}}}}
    return Record(
        Path(f"run-{seed}"),
        config.model_copy(update=changed),
        ({"step": 1, "loss": 2.0 + seed},),
        (),
        evaluation,
        {},
    )


def test_runs_that_differ_by_seed_and_place_are_one_kind():
    kinds = kinds_of(
        [
            record(0, 0.5),
            record(1, 0.6, run_dir=Path("elsewhere"), resume="auto"),
            record(0, 0.7, w_sigma=1.0),
        ]
    )

    assert [sorted(kind.by_seed) for kind in kinds] == [[0, 1], [0]]
    assert [kind.name for kind in kinds] == ["digits-simclr", "digits-simclr, gessl.w_sigma 1.0"]


def test_a_paired_difference_has_students_interval_over_the_shared_seeds():
    first, second = {0: 0.5, 1: 0.6, 2: 0.8, 7: 0.1}, {0: 0.6, 1: 0.9, 2: 0.8, 8: 9.0}
    differences = [0.1, 0.3, 0.0]
    low, high = stats.t.interval(0.95, 2, loc=statistics.mean(differences), scale=stats.sem(differences))

    mean, half, count = paired_difference(first, second)

    assert count == 3
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert paired_difference({0: 1.0}, {1: 2.0})[2] == 0


def test_the_table_holds_means_deviations_and_paired_differences():
    records = [
        record(0, 0.50),
        record(1, 0.60),
        record(0, 0.55, 1.0),
        record(1, 0.75, 1.0),
        record(2, 0.99, 1.0),
    ]

    table = comparison_table(kinds_of(records))
    headings, rows = table.headings, table.rows

    assert headings == ["runs", "seeds", "k-NN %", "SSL loss"]
    assert rows[0] == ["digits-simclr", "2", "55.0 ± 7.1", "2.500 ± 0.707"]
    assert rows[1][1:3] == ["3", "76.3 ± 22.0"]
    half = stats.t.ppf(0.975, 1) * statistics.stdev([5.0, 15.0]) / 2**0.5
    assert rows[2][:3] == [
        "difference to the first",
        "2 paired",
        f"+10.0\n[{10 - half:+.1f}, {10 + half:+.1f}]",
    ]
