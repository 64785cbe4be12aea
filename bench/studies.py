"""Training runs of the real command, one a cell of a study: a cell that is done is not run again, a cell that
was cut goes on.

Cells run in processes of their own, so that what is measured is what a user gets. Choices (alpha, w_sigma)
are made on a validation split of the training images, never on test images.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench import results
from bench.timing import clock, ratio, wait
from fastgessl import pipelines
from fastgessl.build import build_loader, build_objective, make_plan
from fastgessl.config import Config
from fastgessl.distributed import build_accelerator
from fastgessl.pipelines.sources.images import ArrayImages
from fastgessl.recipes import load

VALIDATION_SHARE = 0.2
MEASURES = ("accuracy", "sigma", "discriminability", "generalisation", "transferability")
"""What is compared of an evaluation: accuracies, and sigma against the labels, of the training and held-out
images (`sigma`) and of further ones (`universality`)."""


class OutOfTime(Exception):
    """The study's time is over; what is done stays, and the next call goes on."""


@dataclass(frozen=True)
class Cell:
    """One run: a recipe and the options that differ from it, on one .npz."""

    folder: Path
    recipe: str
    data: Path
    seed: int
    options: Mapping[str, object]


def measured(cell: Cell, common: Sequence[str], deadline: float) -> dict[str, float]:
    """Every accuracy and sigma of the cell's evaluation, by `task.key`; trains it first if need be. Raises
    OutOfTime at the deadline.
    """
    return leaves(rows_of(evaluation(cell, common, deadline))["this run"])


def evaluation(cell: Cell, common: Sequence[str], deadline: float) -> dict[str, Any]:
    """evaluation.json of the cell. Raises ValueError if its folder was begun for something else."""
    _claim(cell, common)
    finished = cell.folder / "evaluation.json"
    if not finished.is_file():
        _train(cell, common, deadline)
    return json.loads(finished.read_text())


def rows_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of each encoder: by task on the run's own images, with `universality`, and by the
    name of each further data set.
    """
    further = {name: rows_of(report) for name, report in evaluation.get("transfer", {}).items()}
    universality = evaluation.get("universality", {}).get("rows", {})
    return {
        row: {
            **values,
            **({"universality": universality[row]["groups"]} if row in universality else {}),
            **(
                {"transfer": moved}
                if (moved := {name: rows[row] for name, rows in further.items() if row in rows})
                else {}
            ),
        }
        for row, values in evaluation["rows"].items()
    }


def commits(folder: Path) -> list[str]:
    """Of the code that began the runs below a folder."""
    return sorted({json.loads(path.read_text())["commit"] for path in folder.rglob("*.cell.json")})


def _claim(cell: Cell, common: Sequence[str]) -> None:
    """Keep beside the run what it was begun with: the folder's name does not say it, and another question
    must not get this answer.
    """
    asked = {
        "recipe": cell.recipe,
        "seed": cell.seed,
        "options": {name: str(value) for name, value in cell.options.items()},
        "judging": list(common),
        "data": hashlib.sha256(cell.data.read_bytes()).hexdigest() if cell.data.is_file() else None,
    }
    record = cell.folder.with_name(f"{cell.folder.name}.cell.json")
    if record.is_file():
        begun = json.loads(record.read_text())
        for key, value in asked.items():
            if begun[key] != value:
                raise ValueError(
                    f"{cell.folder} was begun with {key} {begun[key]}, and {value} is asked for. Delete it, "
                    "or give another --work."
                )
    elif cell.folder.exists():
        raise ValueError(
            f"{cell.folder} exists without {record.name}, which says what it was begun with. Give another "
            "--work, or delete it."
        )
    else:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asked | {"commit": results.commit()}, indent=1) + "\n")


def _train(cell: Cell, common: Sequence[str], deadline: float) -> None:
    options = {
        "data.name": "npz",
        "data.root": cell.data,
        "train.seed": cell.seed,
        "train.run_dir": cell.folder,
        "train.resume": "if_any",
        "log.trackers": "",
        **cell.options,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgessl", "train", cell.recipe, *words, *common],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            code = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise OutOfTime from None
        if code:
            said.seek(0)
            raise RuntimeError(f"{cell.folder.name} ended with code {code}: {said.read()[-2000:]}")


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


def write_parts(
    folder: Path, arrays: Mapping[str, np.ndarray], share: float, seed: int = 0
) -> tuple[Path, Path]:
    """(all, choice): `share` of the training images with the test images, and the same training images with a
    fifth of them as the test split, on which choices are made."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(arrays["train_y"]))[
        : max(round(share * len(arrays["train_y"])), 1)
    ]
    x, y = arrays["train_x"][order], arrays["train_y"][order]
    held = round(VALIDATION_SHARE * len(y))
    whole, choice = folder / f"all-{share:g}.npz", folder / f"choice-{share:g}.npz"
    _write_once(whole, {"train_x": x, "train_y": y, "test_x": arrays["test_x"], "test_y": arrays["test_y"]})
    _write_once(choice, {"train_x": x[held:], "train_y": y[held:], "test_x": x[:held], "test_y": y[:held]})
    return whole, choice


def _write_once(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    if not path.exists():
        partial = path.with_suffix(".part.npz")
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
        partial.rename(path)


def plain(config: Config) -> Config:
    """The same training without sigma."""
    return config.model_copy(update={"gessl": config.gessl.model_copy(update={"w_sigma": 0.0})})


def step_time_ratio(one: Config, other: Config, steps: int = 20) -> float:
    """Time of a step of `one` over that of `other`, taken in turns on views of their own: the median of the
    rounds.

    A round goes from one step with sigma to the next, so that `gessl.every` counts.
    """
    contenders = [_stepper(config) for config in (one, other)]
    every, now = max(one.gessl.every, other.gessl.every), clock()
    taken: list[list[float]] = [[], []]
    for start in range(0, steps, every):
        for stepped, spent in zip(contenders, taken, strict=True):
            wait()
            started = now()
            for step in range(start, start + every):
                stepped(step)
            wait()
            spent.append(now() - started)
    return ratio(taken[0][1:], taken[1][1:])


def _stepper(config: Config) -> Callable[[int], None]:
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(config, Path(folder))
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None
    loader = build_loader(config, images, accelerator)
    objective = build_objective(config, make_plan(config, images, loader, accelerator)).to(accelerator.device)
    batch = next(iter(loader))

    def stepped(step: int) -> None:
        objective(batch.views, step, labels=batch.label).loss.backward()
        objective.zero_grad(set_to_none=True)

    return stepped


def kept(path: Path, measure: Callable[[], float]) -> float:
    """A measurement that decides what is run: made once, and the same whenever the study goes on."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.json")
        partial.write_text(json.dumps(measure()))
        partial.rename(path)
    return json.loads(path.read_text())


def with_options(recipe: str, options: Mapping[str, object]) -> Config:
    """The recipe with `section.field` options over it."""
    changed: dict[str, dict[str, object]] = {}
    for name, value in options.items():
        section, field = name.split(".")
        changed.setdefault(section, {})[field] = value
    base = load(recipe).config.model_dump()
    return Config.model_validate(
        base | {section: base[section] | values for section, values in changed.items()}
    )


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else math.nan,
    }


def paired(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean of own - other, pair by pair, with its 95 % interval (Student's t).

    >>> {key: round(value, 3) for key, value in paired([0.9, 0.8, 0.9], [0.8, 0.8, 0.7]).items()}
    {'mean': 0.1, 'low': -0.148, 'high': 0.348}
    """
    differences = [first - second for first, second in zip(own, other, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    half = (
        float(stats.t.ppf(0.975, len(differences) - 1))
        * statistics.stdev(differences)
        / len(differences) ** 0.5
    )
    return {"mean": mean, "low": mean - half, "high": mean + half}


def grid(alphas: Sequence[float], weights: Sequence[float]) -> Iterator[dict[str, object]]:
    """Every pair of alpha and w_sigma as options."""
    for alpha in alphas:
        for weight in weights:
            yield {"gessl.inner_lr": alpha, "gessl.w_sigma": weight}
