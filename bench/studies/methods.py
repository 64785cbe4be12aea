"""What does each method give on the same images? The table of all methods, DSA beside plain and supervised
training, and a ladder.

    python -m bench.studies.methods                   every method on digits
    python -m bench.studies.methods --table dsa       SimCLR and BYOL plain, with DSA, and supervised
    python -m bench.studies.methods --table ladder    base, CISSL / DISSL, + dimension, + augmentation

Every row and seed is a run of the real command under --work: a call that is cut by --minutes continues where
it stopped. Whatever comes out is printed.
"""

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

from bench import studies
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
Measured = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One line of a table: a recipe with options, on images of which `outliers` is the share that shows
    nothing.
    """

    recipe: str
    options: Mapping[str, object] = field(default_factory=dict)
    outliers: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser(__doc__, "methods")
    parser.add_argument("--table", choices=TASKS, default="methods")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(METHODS), help="for --table methods: these alone"
    )
    arguments = parser.parse_args(argv)
    folder = arguments.work / arguments.table
    common = {"train.epochs": arguments.epochs} if arguments.epochs else {}
    if arguments.table == "dsa":
        rows = dsa_rows()
    elif arguments.table == "ladder":
        rows = ladder_rows(folder, common)
    else:
        rows = {name: Row(f"digits-{name}") for name in arguments.methods or sorted(METHODS)}
    rows = {name: replace(row, options={**common, **row.options}) for name, row in rows.items()}
    runner = Runner(folder, TASKS[arguments.table], time.monotonic() + 60 * arguments.minutes)
    seeds, complete = runner.table(rows, arguments.seeds or 5)
    found = {"rows": {name: vars(row) for name, row in rows.items()}, "complete": complete, "seeds": seeds}
    found["mean"] = studies.means(seeds)
    if arguments.table == "dsa":
        found["gap_closed"] = gap_closed(found["mean"])
        print(f"share of the gap closed: {found['gap_closed']}")
    studies.finish(f"{arguments.table}-digits", found, folder, arguments.out)


def dsa_rows() -> dict[str, Row]:
    """SimCLR and BYOL plain and regulated for each share of outliers; supervised training sees clean images,
    as the bound of all.
    """
    rows = {"supervised": Row("digits-supervised")}
    for share in SHARES:
        for method in ("simclr", "byol"):
            rows[f"{method}, plain, {share:.0%} outliers"] = Row(f"digits-{method}", outliers=share)
            rows[f"{method}, DSA, {share:.0%} outliers"] = Row(f"digits-{method}-dsa", outliers=share)
    return rows


def ladder_rows(folder: Path, common: Mapping[str, object]) -> dict[str, Row]:
    """Each rung adds to the one before; SwAV and DISSL with multi-crop at equal compute: equal epochs times
    seconds of a step, whose ratio is kept in the folder of the runs.
    """
    rows: dict[str, Row] = {}
    for base, ideal in (("simclr", "cissl"), ("dino", "dissl")):
        rows[base] = Row(f"digits-{base}")
        rows[ideal] = Row(f"digits-{ideal}")
        rows[f"{ideal} + dimension"] = Row(f"digits-{ideal}", WIDER)
        rows[f"{ideal} + dimension + augmentation"] = Row(f"digits-{ideal}", WIDER | COARSER)
    swav, dissl = (
        studies.with_options(f"digits-{name}", {**common, **MULTI_CROP}) for name in ("swav", "dissl")
    )
    ratio = studies.kept(folder / "dissl-over-swav.json", lambda: studies.step_time_ratio(dissl, swav))
    epochs = max(round(swav.train.epochs / ratio), 1)
    rows["swav, multi-crop"] = Row("digits-swav", {**MULTI_CROP, "train.epochs": swav.train.epochs})
    rows["dissl, multi-crop, equal compute"] = Row("digits-dissl", {**MULTI_CROP, "train.epochs": epochs})
    return rows


def with_outliers(arrays: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """The same arrays with training images added until `share` of them are outliers: pixels of an image in
    random order, random labels.
    """
    if share == 0:
        return dict(arrays)
    random = np.random.default_rng(0)
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

    def table(self, rows: Mapping[str, Row], seeds: int) -> tuple[list[Measured], bool]:
        """What was measured of every row, seed by seed, and whether that is all of it."""
        arrays = studies.arrays_of("digits")
        data = {
            share: studies.stored(self.folder / f"digits-{share:g}.npz", with_outliers(arrays, share))
            for share in {0.0, *(row.outliers for row in rows.values())}
        }
        found: list[Measured] = []
        for seed in range(seeds):
            found.append({})
            for name, row in rows.items():
                slug = name.replace(",", "").replace(" + ", "+").replace(" ", "-").replace("%", "")
                run = self.folder / f"{slug}-seed{seed}"
                cell = Cell(run, row.recipe, data[row.outliers], seed, row.options)
                try:
                    measured = self._measured(cell, data[0.0])
                except OutOfTime:
                    return [each for each in found if each], False
                own = measured.pop("this run")
                # The baselines of the first row stand for all.
                found[-1] = (found[-1] or measured) | {name: own}
                print(f"seed {seed}: {name} {own}", file=sys.stderr, flush=True)
        return found, True

    def _measured(self, cell: Cell, clean: Path) -> Measured:
        """Accuracies and crowding by row of the evaluation, on the clean images whatever the run was trained
        on.
        """
        judging = ("--evaluate.tasks", *self.tasks)
        found = cell.evaluation(judging, self.deadline)
        if cell.data != clean:
            found = judged(cell, clean, judging)
        rows: Measured = {}
        for row, values in studies.rows_of(found).items():
            rows[row] = {
                key.removesuffix(".accuracy"): value for key, value in studies.leaves(values).items()
            }
            if "crowding" in values.get("geometry", {}):
                rows[row]["crowding"] = values["geometry"]["crowding"]
        return rows


def judged(cell: Cell, clean: Path, judging: Sequence[str]) -> dict[str, Any]:
    """The run's evaluation on other images than those it was trained on, kept beside its own."""
    kept = cell.folder / "clean.json"
    if not kept.is_file():
        words = ["evaluate", str(cell.folder), "--data.root", str(clean), *judging]
        subprocess.run([sys.executable, "-m", "fastgessl", *words], check=True, capture_output=True)
        shutil.copy(cell.folder / "evaluation.json", kept)
    return json.loads(kept.read_text())


def gap_closed(answer: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """(DSA - plain) / (supervised - plain) of the means, by row and measure: 1 closes the gap, a negative
    number widens it.
    """
    closed: dict[str, dict[str, float]] = {}
    for name, regulated in answer.items():
        plain = answer.get(name.replace("DSA", "plain"), {})
        if "DSA" in name and plain and "supervised" in answer:
            for measure, bound in answer["supervised"].items():
                gap = bound["mean"] - plain[measure]["mean"]
                gained = regulated[measure]["mean"] - plain[measure]["mean"]
                closed.setdefault(name, {})[measure] = gained / gap
    return closed


if __name__ == "__main__":
    main()
