"""What the folders of runs say, and several runs side by side: mean ± s.d. over seeds, and differences to the
first kind of run paired over the seeds that both have.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from fastgessl.config import Config, UsageError
from fastgessl.evaluate.tables import Table
from fastgessl.runs import read_config

Series = tuple[list[float], list[float]]
"""Steps and values."""
# Heading -> (task, measurement) in evaluation.json's row of the run itself.
MEASURES = {
    "linear %": ("linear", "accuracy"),
    "few labels %": ("few_labels", "accuracy"),
    "k-NN %": ("knn", "accuracy"),
    "linear SGD %": ("linear_sgd", "accuracy"),
    "MLP %": ("mlp", "accuracy"),
    "σ test": ("sigma", "generalisation"),
    "eff. rank": ("geometry", "effective_rank"),
    "crowding": ("geometry", "crowding"),
}
LOSS, SPEED = "SSL loss", "images/s"
DIGITS = dict.fromkeys(MEASURES, 1) | {"σ test": 3, "crowding": 2, LOSS: 3, SPEED: 0}
# What may differ between two runs that are one experiment.
INDIFFERENT = {
    f"train.{name}"
    for name in ("seed", "run_dir", "resume", "device", "keep_checkpoints", "checkpoint_every")
}


@dataclass(frozen=True)
class Record:
    """A run, read."""

    folder: Path
    config: Config
    metrics: tuple[dict[str, Any], ...]
    timing: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any]
    """As evaluation.json; empty if the run has not been trained to its end."""
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, which is how a person knows the run."""
        return self.folder.resolve().name

    def series(self, name: str) -> Series:
        """A logged number by step, where it was measured and finite; images_per_second is in timing.jsonl."""
        steps, values = [], []
        for line in self.timing if name == "images_per_second" else self.metrics:
            value = line.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                steps.append(float(line["step"]))
                values.append(float(value))
        return steps, values


def read_record(folder: Path) -> Record:
    """A run from its folder. UsageError if it is no run, or holds no metrics and no evaluation."""
    config = read_config(folder)
    metrics, timing = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
    evaluation, environment = (_object(folder / f"{name}.json") for name in ("evaluation", "environment"))
    if not metrics and not evaluation:
        raise UsageError(
            f"run '{folder}' has no metrics.jsonl and no evaluation.json, so there is nothing to report. "
            "Train it first."
        )
    return Record(folder, config, metrics, timing, evaluation, environment)


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a .jsonl file; the half line that a killed run leaves at its end is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return tuple(found)


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{path}' is damaged ({error}). Measure the run again: fastgessl evaluate {path.parent}"
        ) from None
    return values if isinstance(values, dict) else {}


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
    loss = record.series("loss_ssl")[1] or record.series("loss")[1]
    speed = record.series("images_per_second")[1]
    found: dict[str, Any] = {heading: row.get(task, {}).get(key) for heading, (task, key) in MEASURES.items()}
    found |= {LOSS: loss[-1] if loss else None, SPEED: statistics.median(speed) if speed else None}
    return {
        heading: (100.0 if heading.endswith("%") else 1.0) * value
        for heading, value in found.items()
        if value is not None
    }


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
