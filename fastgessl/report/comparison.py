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

from fastgessl.evaluate.tables import Table
from fastgessl.report.record import Record

# Heading -> (task, measurement) in evaluation.json's row of the run itself, and its factor.
MEASURES = {
    "linear %": ("linear", "accuracy", 100),
    "few labels %": ("few_labels", "accuracy", 100),
    "k-NN %": ("knn", "accuracy", 100),
    "linear SGD %": ("linear_sgd", "accuracy", 100),
    "MLP %": ("mlp", "accuracy", 100),
    "σ test": ("sigma", "generalisation", 1),
    "eff. rank": ("geometry", "effective_rank", 1),
    "crowding": ("geometry", "crowding", 1),
}
LOSS, SPEED = "SSL loss", "images/s"
DIGITS = dict.fromkeys(MEASURES, 1) | {"σ test": 3, "crowding": 2, LOSS: 3, SPEED: 0}
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
        name = ", ".join([members[0].config.recipe, *changed[:4]])
        if len(changed) > 4:
            name += f" and {len(changed) - 4} more"
        kinds.append(Kind(name, {record.config.train.seed: record for record in members}))
    return kinds


def measured(record: Record) -> dict[str, float]:
    """Heading -> number, of what evaluation.json has of the run itself."""
    rows: Mapping[str, Any] = record.evaluation.get("rows", {})
    row: Mapping[str, Any] = rows.get("this run") or next(reversed(list(rows.values())), {})
    found = {}
    for heading, (task, key, factor) in MEASURES.items():
        value = row.get(task, {}).get(key)
        if isinstance(value, int | float):
            found[heading] = factor * float(value)
    loss = record.series("loss_ssl")[1] or record.series("loss")[1]
    if loss:
        found[LOSS] = loss[-1]
    speed = record.series("images_per_second")[1]
    if speed:
        found[SPEED] = statistics.median(speed)
    return found


def comparison_table(kinds: list[Kind]) -> Table:
    """A row per kind with mean ± s.d., and under each but the first its paired difference with a 95 %
    interval.
    """
    numbers = [{seed: measured(record) for seed, record in kind.by_seed.items()} for kind in kinds]
    headings = [name for name in DIGITS if any(_by_seed(each, name) for each in numbers)]
    rows = []
    for kind, own in zip(kinds, numbers, strict=True):
        cells = [summary(list(_by_seed(own, name).values()), DIGITS[name]) for name in headings]
        rows.append([kind.name, str(len(own)), *cells])
        if own is not numbers[0]:
            cells = [
                _difference(_by_seed(numbers[0], name), _by_seed(own, name), DIGITS[name])
                for name in headings
            ]
            rows.append(["difference to the first", f"{len(set(numbers[0]) & set(own))} paired", *cells])
    return Table(["runs", "seeds", *headings], rows)


def summary(values: list[float], digits: int) -> str:
    """mean ± standard deviation (n − 1).

    >>> summary([1.0, 2.0, 3.0], 1), summary([1.5], 2), summary([], 1)
    ('2.0 ± 1.0', '1.50', '–')
    """
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, int]:
    """Mean of second − first over the seeds that both have, half of its 95 % interval (Student's t; infinite
    for one), number of seeds.

    >>> paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0, 2: 9.0})
    (1.0, 0.0, 2)
    """
    differences = [second[seed] - first[seed] for seed in sorted(set(first) & set(second))]
    count = len(differences)
    mean = statistics.mean(differences) if differences else float("nan")
    if count < 2:
        return mean, float("inf"), count
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    return mean, float(half), count


def _by_seed(numbers: Mapping[int, Mapping[str, float]], heading: str) -> dict[int, float]:
    return {seed: values[heading] for seed, values in numbers.items() if heading in values}


def _difference(first: Mapping[int, float], second: Mapping[int, float], digits: int) -> str:
    mean, half, count = paired_difference(first, second)
    if not count:
        return "–"
    interval = f"\n[{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]" if count > 1 else ""
    return f"{mean:+.{digits}f}{interval}"


def _options(record: Record) -> dict[str, Any]:
    """Dotted option -> value, without what does not make another experiment."""
    return {
        option: value
        for option, value in record.config.options().items()
        if not option.startswith(("evaluate.", "log.")) and option not in INDIFFERENT
    }
