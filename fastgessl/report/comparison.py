"""Several runs side by side: mean ± s.d. over seeds, and differences to the first kind of run paired over the
seeds that both have.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy import stats

from fastgessl.report.record import Record

# (task, measurement, heading, factor, decimals) in evaluation.json's row of the run itself.
MEASURES = (
    ("linear", "accuracy", "linear %", 100, 1),
    ("few_labels", "accuracy", "few labels %", 100, 1),
    ("knn", "accuracy", "k-NN %", 100, 1),
    ("linear_sgd", "accuracy", "linear SGD %", 100, 1),
    ("mlp", "accuracy", "MLP %", 100, 1),
    ("sigma", "generalisation", "σ test", 1, 3),
    ("geometry", "effective_rank", "eff. rank", 1, 1),
    ("geometry", "crowding", "crowding", 1, 2),
)
# What may differ between two runs that are one experiment.
INDIFFERENT = {
    f"train.{name}"
    for name in ("seed", "run_dir", "resume", "device", "keep_checkpoints", "checkpoint_every")
}


@dataclass(frozen=True)
class Kind:
    """Runs that differ by their seed alone."""

    name: str
    by_seed: dict[int, Record]


def kinds_of(records: list[Record]) -> list[Kind]:
    """The runs grouped by configuration, in the order in which they were given; a later run of the same seed
    replaces an earlier one.

    A kind is called by its recipe and the options in which it differs from the first.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(_options(record), sort_keys=True), []).append(record)
    first = _options(records[0])
    kinds = []
    for members in groups.values():
        own = _options(members[0])
        changed = [
            f"{key} {value}" for key, value in own.items() if value != first.get(key) and key != "recipe"
        ]
        name = ", ".join([members[0].config.recipe, *changed[:4]]) + (
            f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        )
        kinds.append(Kind(name, {record.config.train.seed: record for record in members}))
    return kinds


def measured(record: Record) -> dict[str, float]:
    """Heading -> number, of what evaluation.json has of the run itself."""
    rows: Mapping[str, Any] = record.evaluation.get("rows", {})
    row: Mapping[str, Any] = rows.get("this run") or next(reversed(list(rows.values())), {})
    found = {}
    for task, key, heading, factor, _ in MEASURES:
        value = row.get(task, {}).get(key)
        if isinstance(value, int | float):
            found[heading] = factor * float(value)
    loss = record.series("loss_ssl")[1] or record.series("loss")[1]
    if loss:
        found["SSL loss"] = loss[-1]
    speed = record.series("images_per_second")[1]
    if speed:
        found["images/s"] = statistics.median(speed)
    return found


def comparison_cells(kinds: list[Kind]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row a kind with mean ± s.d., and under each but the first its paired difference
    with a 95 % interval.
    """
    numbers = [{seed: measured(record) for seed, record in kind.by_seed.items()} for kind in kinds]
    known = [heading for _, _, heading, _, _ in MEASURES] + ["SSL loss", "images/s"]
    headings = [
        heading for heading in known if any(heading in values for each in numbers for values in each.values())
    ]
    rows = []
    for number, kind in enumerate(kinds):
        cells = []
        for heading in headings:
            values = [values[heading] for values in numbers[number].values() if heading in values]
            cells.append(summary(values, _decimals(heading)))
        rows.append([kind.name, str(len(kind.by_seed)), *cells])
        if number:
            rows.append(["difference to the first", *_difference_row(numbers[0], numbers[number], headings)])
    return ["runs", "seeds", *headings], rows


def summary(values: list[float], decimals: int) -> str:
    """mean ± standard deviation (n − 1).

    >>> summary([1.0, 2.0, 3.0], 1), summary([1.5], 2), summary([], 1)
    ('2.0 ± 1.0', '1.50', '–')
    """
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, int]:
    """Mean of second − first over the seeds that both have, half of its 95 % interval (Student's t; infinite
    for one), number of seeds.

    >>> paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0, 2: 9.0})
    (1.0, 0.0, 2)
    """
    shared = sorted(set(first) & set(second))
    if not shared:
        return float("nan"), float("inf"), 0
    differences = [second[seed] - first[seed] for seed in shared]
    mean = statistics.mean(differences)
    if len(shared) == 1:
        return mean, float("inf"), 1
    half = stats.t.ppf(0.975, len(shared) - 1) * statistics.stdev(differences) / len(shared) ** 0.5
    return mean, float(half), len(shared)


def _difference_row(
    first: dict[int, dict[str, float]], second: dict[int, dict[str, float]], headings: list[str]
) -> list[str]:
    cells = []
    for heading in headings:
        by_seed = [
            {seed: values[heading] for seed, values in each.items() if heading in values}
            for each in (first, second)
        ]
        mean, half, count = paired_difference(*by_seed)
        decimals = _decimals(heading)
        interval = f"\n[{mean - half:+.{decimals}f}, {mean + half:+.{decimals}f}]" if count > 1 else ""
        cells.append(f"{mean:+.{decimals}f}{interval}" if count else "–")
    return [f"{len(set(first) & set(second))} paired", *cells]


def _decimals(heading: str) -> int:
    return {name: decimals for _, _, name, _, decimals in MEASURES}.get(
        heading, 3 if heading == "SSL loss" else 0
    )


def _options(record: Record) -> dict[str, Any]:
    """Dotted option -> value, without what does not make another experiment."""
    return {
        option: value
        for option, value in record.config.options().items()
        if not option.startswith(("evaluate.", "log.")) and option not in INDIFFERENT
    }
