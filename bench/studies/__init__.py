"""Train by the real command, one run for each cell of a study: a cell that is done is not run again, a cell
that was cut continues.

Choices (alpha, w_sigma) are made on a validation split of the training images, never on test images.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy import stats
from torch.utils.benchmark import Timer

from bench import report, results
from fastgessl import pipelines
from fastgessl.build import build_loader, build_objective, make_plan
from fastgessl.config import Config
from fastgessl.distributed import build_accelerator
from fastgessl.pipelines import ArrayImages, Loader
from fastgessl.pipelines.sources.images import Images
from fastgessl.recipes import load

VALIDATION_SHARE = 0.2
MEASURES = ("accuracy", "sigma", "discriminability", "generalisation", "transferability")
"""What is compared of an evaluation: accuracies, and sigma against the labels, of the training and held-out
images (`sigma`) and of further ones (`universality`)."""


class OutOfTime(Exception):
    """The study's time is over; what is done stays, and the next call continues."""


@dataclass(frozen=True)
class Cell:
    """One run: a recipe and the options that differ from it, on one .npz."""

    folder: Path
    recipe: str
    data: Path
    seed: int
    options: Mapping[str, object]

    def evaluation(self, judging: Sequence[str], deadline: float) -> dict[str, Any]:
        """The run's evaluation.json; trains it first if need be. `judging` are the options of the evaluation.

        Raises OutOfTime at the deadline, ValueError if the folder was begun for something else.
        """
        self._claim(judging)
        finished = self.folder / "evaluation.json"
        if not finished.is_file():
            self._train(judging, deadline)
        return json.loads(finished.read_text())

    def _claim(self, judging: Sequence[str]) -> None:
        """Keep beside the run what it was begun with: the folder's name does not say it, and another question
        must not get this answer.
        """
        asked = {
            "recipe": self.recipe,
            "seed": self.seed,
            "options": {name: str(value) for name, value in self.options.items()},
            "judging": list(judging),
            "data": hashlib.sha256(self.data.read_bytes()).hexdigest() if self.data.is_file() else None,
        }
        record = self.folder.with_name(f"{self.folder.name}.cell.json")
        if not record.is_file():
            if self.folder.exists():
                raise ValueError(
                    f"{self.folder} exists without {record.name}, which says what it was begun with. Give "
                    "another --work, or delete it."
                )
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(asked | {"commit": results.commit()}, indent=1) + "\n")
        begun = json.loads(record.read_text())
        if other := [key for key, value in asked.items() if begun[key] != value]:
            raise ValueError(
                f"{self.folder} was begun with {other[0]} {begun[other[0]]}, and {asked[other[0]]} is "
                "asked for. Delete it, or give another --work."
            )

    def _train(self, judging: Sequence[str], deadline: float) -> None:
        options = {
            "data.name": "npz",
            "data.root": self.data,
            "train.seed": self.seed,
            "train.run_dir": self.folder,
            "train.resume": "if_any",
            "log.trackers": "",
            **self.options,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
        # At SIGTERM a run writes a checkpoint, from which the next call continues.
        limit = ["timeout", "--foreground", f"{max(deadline - time.monotonic(), 1):.0f}"]
        command = [*limit, sys.executable, "-m", "fastgessl", "train", self.recipe, *words, *judging]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 124:
            raise OutOfTime
        if done.returncode:
            raise RuntimeError(f"{self.folder.name} ended with code {done.returncode}: {done.stderr[-2000:]}")


def parser(doc: str, work: str) -> argparse.ArgumentParser:
    """The options that every study has."""
    found = results.parser(doc)
    found.add_argument("--seeds", type=int, help="instead of the study's")
    found.add_argument("--epochs", type=int, help="instead of the study's")
    found.add_argument("--minutes", type=float, default=600, help="stop then; the next call continues")
    found.add_argument("--work", type=Path, default=Path("runs") / work, help="folder of the runs")
    return found


def finish(name: str, found: Mapping[str, Any], work: Path, out: Path | None) -> None:
    """Write what a study found, with the commits that began its runs, and print it."""
    commits = sorted({json.loads(path.read_text())["commit"] for path in work.rglob("*.cell.json")})
    path = results.write(name, {**found, "commits_of_runs": commits}, out)
    print("\n".join(report.section(path, path.parent)))
    print(path if found["complete"] else f"{path}: cut. Call it again to continue.")


def rows_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of each encoder: by task on the run's own images, with `universality`, and by the
    name of each further data set.
    """
    rows = {row: dict(values) for row, values in evaluation["rows"].items()}
    for row, measured in evaluation.get("universality", {}).get("rows", {}).items():
        rows[row]["universality"] = measured["groups"]
    for name, further in evaluation.get("transfer", {}).items():
        for row, values in rows_of(further).items():
            if row in rows:
                rows[row].setdefault("transfer", {})[name] = values
    return rows


def leaves(tree: Any, prefix: str = "") -> dict[str, float]:
    """The accuracies and sigmas of a nested result, by their dotted place.

    >>> leaves({"knn": {"accuracy": 0.5, "k": 20}, "few_shot": [{"accuracy": 0.25}]})
    {'knn.accuracy': 0.5, 'few_shot.0.accuracy': 0.25}
    """
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: dict[str, float] = {}
    for key, value in pairs:
        if isinstance(value, int | float) and str(key) in MEASURES:
            found[f"{prefix}{key}"] = float(value)
        found |= leaves(value, f"{prefix}{key}.")
    return found


def arrays_of(name: str, root: Path | None = None) -> dict[str, np.ndarray]:
    """train_x, train_y, test_x, test_y of a labelled data set that lives in memory."""
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        images = pipelines.open_images(name, root, split)
        if not isinstance(images, ArrayImages) or images.labels is None:
            raise SystemExit(
                f"bench: {name} has no labelled {split} arrays. Give an .npz with train_x, train_y, test_x "
                "and test_y."
            )
        arrays |= {f"{split}_x": images.images, f"{split}_y": images.labels}
    return arrays


def parts_of(arrays: Mapping[str, np.ndarray], share: float) -> tuple[dict[str, np.ndarray], ...]:
    """(all, choice): `share` of the training images with the test images, and the same training images with a
    fifth of them as the test split, on which choices are made.
    """
    count = len(arrays["train_y"])
    order = np.random.default_rng(0).permutation(count)[: max(round(share * count), 1)]
    x, y = arrays["train_x"][order], arrays["train_y"][order]
    held = round(VALIDATION_SHARE * len(y))
    choice = {"train_x": x[held:], "train_y": y[held:], "test_x": x[:held], "test_y": y[:held]}
    return {**arrays, "train_x": x, "train_y": y}, choice


def stored(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """The arrays as an .npz, written once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
        partial.rename(path)
    return path


def step_time_ratio(one: Config, other: Config, rounds: int = 20) -> float:
    """Time of a step of `one` over that of `other`, taken in turns on views of their own: the median of the
    rounds. A round is as many steps as belong together under `gessl.every`.
    """
    every = max(one.gessl.every, other.gessl.every)
    timers = [
        Timer("steps()", globals={"steps": _steps(config, every)}, num_threads=torch.get_num_threads())
        for config in (one, other)
    ]
    turns = [[timer.timeit(1).median for timer in timers] for _ in range(rounds)]
    return statistics.median(first / second for first, second in turns)


def _steps(config: Config, every: int) -> Callable[[], None]:
    accelerator, images, loader = prepared(config)
    objective = build_objective(config, make_plan(config, images, loader, accelerator)).to(accelerator.device)
    batch = next(iter(loader))

    def steps() -> None:
        for step in range(every):
            objective(batch.views, step, labels=batch.label).loss.backward()
            objective.zero_grad(set_to_none=True)

    return steps


def prepared(config: Config, split: str = "train") -> tuple[Accelerator, Images, Loader]:
    """What a run of this configuration reads its images with."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(config, Path(folder))
    images = pipelines.open_images(config.data.name, config.data.root, split)
    assert images is not None
    return accelerator, images, build_loader(config, images, accelerator)


def kept(path: Path, measure: Callable[[], float]) -> float:
    """A measurement that decides what is run: made once, and the same whenever the study continues."""
    if not path.is_file():
        results.replaced(path, json.dumps(measure()))
    return json.loads(path.read_text())


def with_options(recipe: str, options: Mapping[str, object]) -> Config:
    """The recipe with `section.field` options over it."""
    config = load(recipe).config.model_dump()
    for name, value in options.items():
        section, field = name.split(".")
        config[section][field] = value
    return Config.model_validate(config)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "deviation": deviation}


def means(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and deviation of every row and measure over the seeds that have it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(name for seed in seeds for name in seed):
        having = [seed[name] for seed in seeds if name in seed]
        found[name] = {measure: summary([row[measure] for row in having]) for measure in having[0]}
    return found


def paired(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean of own - other, pair by pair, with its 95 % interval (Student's t).

    >>> {key: round(value, 3) for key, value in paired([0.9, 0.8, 0.9], [0.8, 0.8, 0.7]).items()}
    {'mean': 0.1, 'low': -0.148, 'high': 0.348}
    """
    differences = np.subtract(own, other)
    mean, half = float(differences.mean()), math.nan
    if len(differences) > 1:
        half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}
