"""What each method gives on the same images: the table of all methods, DSA against plain and supervised
training, and a ladder.

    python -m bench.methods                      every method on digits, five seeds, beside raw pixels and the untrained encoder
    python -m bench.methods --table dsa          SimCLR and BYOL plain, with DSA, and supervised; 0, 5 and 20 % of the images are outliers
    python -m bench.methods --table ladder       base, CISSL / DISSL, + dimension, + augmentation; SwAV against DISSL, both multi-crop

Every row and seed is a run of the real command under --work: a call that is cut by --minutes goes on where it
stopped. Whatever comes out is printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import results, studies
from bench.studies import Cell, OutOfTime
from fastgessl.methods import METHODS

TASKS = {
    "methods": ("linear", "few_labels", "knn"),
    "dsa": ("linear", "geometry"),
    "ladder": ("linear", "few_labels", "knn"),
}
SHARES = (0.0, 0.05, 0.2)
# What the representation-dimension and augmentation levers mean at the size of digits.
WIDER = {"model.dimension": 512, "model.dimension_bottleneck": 128}
COARSER = {"views.jitter_strength": 1.0}
MULTI_CROP = {"views.local_views": 4, "views.local_size": 8}


@dataclass(frozen=True)
class Row:
    """One line of a table: a recipe with options, on images of which `outliers` is the share that shows
    nothing.
    """

    recipe: str
    options: Mapping[str, object] = field(default_factory=dict)
    outliers: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TASKS, default="methods")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(METHODS), help="for --table methods: these alone"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--minutes", type=float, default=600, help="stop after so long; the next call goes on"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args(argv)
    common = {"train.epochs": arguments.epochs} if arguments.epochs else {}
    rows = {
        "methods": lambda: all_methods(arguments.methods or sorted(METHODS)),
        "dsa": dsa_rows,
        "ladder": lambda: ladder_rows(arguments.work / "ladder", common),
    }[arguments.table]()
    runner = Runner(
        arguments.work / arguments.table, TASKS[arguments.table], time.monotonic() + 60 * arguments.minutes
    )
    seeds, complete = runner.table(
        {name: replace(row, options={**common, **row.options}) for name, row in rows.items()}, arguments.seeds
    )
    measured = {
        "rows": {name: vars(row) for name, row in rows.items()},
        "epochs": arguments.epochs,
        "complete": complete,
    }
    measured |= {"commits_of_runs": studies.commits(runner.folder), "seeds": seeds}
    answer = means(seeds)
    if arguments.table == "dsa":
        measured["gap_closed"] = gap_closed(answer)
    path = results.write(f"{arguments.table}-digits", measured | {"mean": answer}, arguments.out)
    Console(width=max(Console().width, 120)).print(
        printed(f"{arguments.table}, digits", answer, measured.get("gap_closed", {}))
    )
    print(path if complete else f"{path}: cut after {arguments.minutes:g} minutes. Call it again to go on.")


def all_methods(names: Sequence[str]) -> dict[str, Row]:
    """Every method by its digits recipe."""
    return {name: Row(f"digits-{name}") for name in names}


def dsa_rows() -> dict[str, Row]:
    """SimCLR and BYOL plain and regulated for each share of outliers; supervised training sees clean images,
    as the bound of all.
    """
    rows = {"supervised": Row("digits-supervised")}
    for share in SHARES:
        for method in ("simclr", "byol"):
            for name, suffix in (("plain", ""), ("DSA", "-dsa")):
                rows[f"{method}, {name}, {share:.0%} outliers"] = Row(
                    f"digits-{method}{suffix}", outliers=share
                )
    return rows


def ladder_rows(folder: Path, common: Mapping[str, object] | None = None) -> dict[str, Row]:
    """Each rung adds to the one before; SwAV and DISSL with multi-crop at equal compute: equal epochs times
    seconds of a step, whose ratio is kept in the folder of the runs."""
    rows: dict[str, Row] = {}
    for base, ideal in (("simclr", "cissl"), ("dino", "dissl")):
        rows[base] = Row(f"digits-{base}")
        rows[ideal] = Row(f"digits-{ideal}")
        rows[f"{ideal} + dimension"] = Row(f"digits-{ideal}", WIDER)
        rows[f"{ideal} + dimension + augmentation"] = Row(f"digits-{ideal}", WIDER | COARSER)
    swav, dissl = (
        studies.with_options(f"digits-{name}", {**(common or {}), **MULTI_CROP}) for name in ("swav", "dissl")
    )
    ratio = studies.kept(folder / "dissl-over-swav.json", lambda: studies.step_time_ratio(dissl, swav))
    epochs = max(round(swav.train.epochs / ratio), 1)
    rows["swav, multi-crop"] = Row("digits-swav", {**MULTI_CROP, "train.epochs": swav.train.epochs})
    rows["dissl, multi-crop, equal compute"] = Row("digits-dissl", {**MULTI_CROP, "train.epochs": epochs})
    return rows


def with_outliers(arrays: Mapping[str, np.ndarray], share: float, seed: int = 0) -> dict[str, np.ndarray]:
    """The same arrays with training images added until `share` of them are outliers: pixels of an image in
    random order, random labels.
    """
    if share == 0:
        return dict(arrays)
    random = np.random.default_rng(seed)
    x, y = arrays["train_x"], arrays["train_y"]
    chosen = x[random.integers(len(x), size=round(share / (1 - share) * len(x)))]
    pixels = chosen.reshape(len(chosen), -1, *x.shape[3:])
    shuffled = np.stack([image[random.permutation(len(image))] for image in pixels]).reshape(chosen.shape)
    labels = random.integers(y.max() + 1, size=len(chosen)).astype(y.dtype)
    return {**arrays, "train_x": np.concatenate([x, shuffled]), "train_y": np.concatenate([y, labels])}


@dataclass(frozen=True)
class Runner:
    """Where the runs are, what is measured of each, and when to stop."""

    folder: Path
    tasks: Sequence[str]
    deadline: float

    def table(self, rows: Mapping[str, Row], seeds: int) -> tuple[list[dict[str, dict[str, float]]], bool]:
        """What was measured of every row, seed by seed, and whether that is all of it."""
        arrays = studies.arrays_of("digits")
        data = {
            share: self._stored(arrays, share)
            for share in sorted({0.0, *(row.outliers for row in rows.values())})
        }
        found: list[dict[str, dict[str, float]]] = []
        for seed in range(seeds):
            found.append({})
            for name, row in rows.items():
                slug = name.replace(",", "").replace(" + ", "+").replace(" ", "-").replace("%", "")
                cell = Cell(
                    self.folder / f"{slug}-seed{seed}", row.recipe, data[row.outliers], seed, row.options
                )
                try:
                    measured = self._measured(cell, data[0.0])
                except OutOfTime:
                    return [each for each in found if each], False
                baselines = (
                    {"raw pixels", "untrained encoder"} & measured.keys()
                    if name == next(iter(rows))
                    else set()
                )
                found[-1] |= {key: measured[key] for key in sorted(baselines)} | {name: measured["this run"]}
                print(f"seed {seed}: {name} {measured['this run']}", file=sys.stderr, flush=True)
        return found, True

    def _measured(self, cell: Cell, clean: Path) -> dict[str, dict[str, float]]:
        """Accuracies and crowding by row of the evaluation, on the clean images whatever the run was trained
        on.
        """
        judging = ("--evaluate.tasks", *self.tasks)
        found = studies.evaluation(cell, judging, self.deadline)
        if cell.data != clean:
            found = _judged(cell, clean, judging)
        return {row: _numbers(values) for row, values in studies.rows_of(found).items()}

    def _stored(self, arrays: Mapping[str, np.ndarray], share: float) -> Path:
        path = self.folder / f"digits-{share:g}.npz"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part.npz")
            np.savez_compressed(partial, **with_outliers(arrays, share))  # type: ignore[arg-type]
            partial.rename(path)
        return path


def _judged(cell: Cell, clean: Path, judging: Sequence[str]) -> dict[str, Any]:
    """The run's evaluation on other images than those it was trained on, kept beside its own."""
    kept = cell.folder / "clean.json"
    if not kept.is_file():
        words = ["evaluate", str(cell.folder), "--data.root", str(clean), *judging]
        subprocess.run(
            [sys.executable, "-m", "fastgessl", *words],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        shutil.copy(cell.folder / "evaluation.json", kept)
    return json.loads(kept.read_text())


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    crowding = (
        {"crowding": values["geometry"]["crowding"]} if "crowding" in values.get("geometry", {}) else {}
    )
    return {key.removesuffix(".accuracy"): value for key, value in studies.leaves(values).items()} | crowding


def means(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and deviation of every row and measure over the seeds that have it."""
    names = list(dict.fromkeys(name for seed in seeds for name in seed))
    return {
        name: {
            measure: studies.summary([seed[name][measure] for seed in having]) for measure in having[0][name]
        }
        for name in names
        if (having := [seed for seed in seeds if name in seed])
    }


def gap_closed(answer: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """(DSA - plain) / (supervised - plain) of the means, by row and measure: 1 closes the gap, a negative
    number widens it.
    """
    closed: dict[str, dict[str, float]] = {}
    for name, regulated in answer.items():
        plain = answer.get(name.replace("DSA", "plain"), {})
        if "DSA" in name and plain and "supervised" in answer:
            closed[name] = {
                measure: (regulated[measure]["mean"] - plain[measure]["mean"])
                / (bound["mean"] - plain[measure]["mean"])
                for measure, bound in answer["supervised"].items()
            }
    return closed


def printed(title: str, answer: Mapping[str, Any], closed: Mapping[str, Mapping[str, float]]) -> Table:
    """Means ± deviations: accuracies in per cent, the crowding ratio as it is; DSA's rows with the share of
    the gap that is closed.
    """
    measures = list(dict.fromkeys(measure for values in answer.values() for measure in values))
    table = Table(title=f"{title}: mean ± s.d. over seeds")
    for column in ("", *measures, *(f"gap closed, {measure}" for measure in (measures if closed else ()))):
        table.add_column(column)
    for name, values in answer.items():
        cells = [_cell(measure, values.get(measure)) for measure in measures]
        shares = [
            f"{closed[name][measure]:+.0%}" if name in closed else ""
            for measure in (measures if closed else ())
        ]
        table.add_row(name, *cells, *shares)
    return table


def _cell(measure: str, found: Mapping[str, float] | None) -> str:
    scale, digits = (1, 3) if measure == "crowding" else (100, 1)
    return (
        ""
        if found is None
        else f"{scale * found['mean']:.{digits}f} ± {scale * found['deviation']:.{digits}f}"
    )


if __name__ == "__main__":
    main()
