"""Does GeSSL help? Plain training against GeSSL's presets, at equal epochs and at equal seconds, over seeds;
printed whatever it says.

    python -m bench.does_gessl_help --study digits                                        on a CPU
    python -m bench.does_gessl_help --study cifar10-small --cifar10 FILE.npz              on a CPU, hours
    python -m bench.does_gessl_help --study cifar10 --cifar10 FILE.npz [--transfer cifar100=FILE.npz ...]    on a GPU

alpha and w_sigma of each preset are chosen by the linear probe on a validation split of the training images,
with a seed of their own. Every cell (share of the images, method, variant, seed) is a run of the real command
under --work: a call that is cut by --minutes goes on where it stopped. Differences are paired over seeds,
with 95 % intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import results, studies
from bench.studies import Cell, OutOfTime
from fastgessl.config import Config

CHOICE_SEED = 1000
PLAIN = "plain"


@dataclass(frozen=True)
class Study:
    """What is trained and how it is judged."""

    data: str
    methods: tuple[str, ...]
    presets: tuple[str, ...]
    alphas: tuple[float, ...]
    weights: tuple[float, ...]
    seeds: int
    epochs: int
    shares: tuple[float, ...]
    """Shares of the training images that are pretrained on."""
    tasks: tuple[str, ...]
    options: Mapping[str, object]


STUDIES = {
    "digits": Study(
        "digits", ("simclr",), ("fast", "head"), (0.01, 0.03), (0.3, 1.0), 5, 50, (1.0,), ("linear", "few_labels", "knn", "sigma"), {}
    ),
    "cifar10-small": Study(
        "cifar10", ("simclr", "byol"), ("fast", "head"), (0.01, 0.03), (0.3, 1.0), 5, 10, (0.1,), ("linear", "few_labels", "knn", "sigma"),
        {"model.width": 0.25, "views.size": 16, "train.batch_size": 128, "schedule.warmup_epochs": 2},
    ),
    "cifar10": Study(
        "cifar10", ("simclr", "byol"), ("fast", "head"), (0.003, 0.01, 0.03), (0.3, 1.0, 3.0), 3, 200, (1.0, 0.1),
        ("linear", "knn", "label_fractions", "few_shot", "universality"), {},
    ),
    "tiny": Study("digits", ("simclr",), ("fast",), (0.01,), (0.3, 1.0), 2, 1, (0.3,), ("knn", "linear"), {"model.width": 0.0625}),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, default="digits")
    parser.add_argument("--cifar10", type=Path, help="an .npz with train_x, train_y, test_x, test_y")
    parser.add_argument(
        "--transfer",
        nargs="*",
        default=[],
        help="further data sets for the frozen encoder, as --evaluate.transfer",
    )
    parser.add_argument("--methods", nargs="+", help="instead of the study's")
    parser.add_argument("--seeds", type=int, help="instead of the study's")
    parser.add_argument("--epochs", type=int, help="instead of the study's")
    parser.add_argument(
        "--minutes", type=float, default=600, help="stop after so long; the next call goes on"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/does-gessl-help"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args(argv)
    chosen = STUDIES[arguments.study]
    changed = {
        key: value for key in ("methods", "seeds", "epochs") if (value := getattr(arguments, key)) is not None
    }
    study = Study(**(vars(chosen) | changed))
    arrays = studies.arrays_of("npz" if study.data == "cifar10" else study.data, arguments.cifar10)
    asker = Asker(
        study, arguments.work / arguments.study, arguments.transfer, time.monotonic() + 60 * arguments.minutes
    )
    answers: dict[str, Any] = {}
    complete = True
    try:
        for share in study.shares:
            whole, choice = studies.write_parts(asker.folder, arrays, share)
            for method in study.methods:
                answers[f"{method}, {share:.0%} of the images"] = asker.answer(method, share, whole, choice)
    except OutOfTime:
        complete = False
    found = {
        "study": vars(study),
        "complete": complete,
        "commits_of_runs": studies.commits(asker.folder),
        "answers": answers,
    }
    path = results.write(f"does-gessl-help-{arguments.study}", found, arguments.out)
    for title, answer in answers.items():
        Console(width=max(Console().width, 160)).print(table(title, answer))
    print(path if complete else f"{path}: cut after {arguments.minutes:g} minutes. Call it again to go on.")


@dataclass(frozen=True)
class Asker:
    """A study under way: where its runs are and when it must stop."""

    study: Study
    folder: Path
    transfer: Sequence[str]
    deadline: float

    def answer(self, method: str, share: float, whole: Path, choice: Path) -> dict[str, Any]:
        """Choose each preset's alpha and w_sigma, then run every variant with every seed."""
        study, part = self.study, f"{share:g}-{method}"
        recipes = {PLAIN: f"{study.data}-{method}"} | {
            f"GeSSL, {preset}": f"{study.data}-{method}-gessl-{preset}" for preset in study.presets
        }
        base = {"train.epochs": study.epochs, **study.options}
        choices = {
            variant: self._choose(recipe, part, choice, base) for variant, recipe in list(recipes.items())[1:]
        }
        data = {"data.name": "npz", "data.root": whole}
        dearer = {
            variant: self._step_time_ratio(
                variant, studies.with_options(recipes[variant], base | data | chosen["options"]), part
            )
            for variant, chosen in choices.items()
        }
        longer = {
            _longer(variant): round(study.epochs * max(1.0, ratio)) for variant, ratio in dearer.items()
        }
        variants = {PLAIN: base} | {
            variant: base | {"train.epochs": epochs} for variant, epochs in longer.items()
        }
        variants |= {variant: base | chosen["options"] for variant, chosen in choices.items()}
        seeds: list[dict[str, dict[str, float]]] = []
        for seed in range(study.seeds):
            seeds.append({})
            for variant, options in variants.items():
                folder = self.folder / part / f"{_slug(variant)}-seed{seed}"
                cell = Cell(folder, recipes.get(variant, recipes[PLAIN]), whole, seed, options)
                rows = studies.rows_of(studies.evaluation(cell, self._judging(), self.deadline))
                baselines = {row: studies.leaves(found) for row, found in rows.items() if row != "this run"}
                seeds[-1] |= baselines | {variant: studies.leaves(rows["this run"])}
                print(f"{method} {share:g} seed {seed}: {variant}", file=sys.stderr, flush=True)
        return {
            "choices": choices,
            "step_time_ratio": dearer,
            "epochs": longer,
            "seeds": seeds,
        } | _statistics(seeds)

    def _step_time_ratio(self, variant: str, config: Config, part: str) -> float:
        """A step of GeSSL's over a plain one: it decides how long plain training is at equal seconds."""
        path = self.folder / part / f"{_slug(variant)}-step-time-ratio.json"
        return studies.kept(path, lambda: studies.step_time_ratio(config, studies.plain(config)))

    def _choose(self, recipe: str, part: str, choice: Path, base: Mapping[str, object]) -> dict[str, Any]:
        """The grid's best by linear accuracy on the validation split, the first of equals."""
        tried = []
        for options in studies.grid(self.study.alphas, self.study.weights):
            name = "-".join(f"{value:g}" for value in options.values())  # type: ignore[str-format]
            cell = Cell(
                self.folder / part / "choice" / f"{recipe}-{name}",
                recipe,
                choice,
                CHOICE_SEED,
                {**base, **options},
            )
            found = studies.measured(cell, ("--evaluate.tasks", "linear"), self.deadline)
            tried.append({"options": options, "linear": found["linear.accuracy"]})
        return {"options": max(tried, key=lambda each: each["linear"])["options"], "tried": tried}  # type: ignore[arg-type, return-value]

    def _judging(self) -> list[str]:
        transfer = ["--evaluate.transfer", *self.transfer] if self.transfer else []
        return ["--evaluate.tasks", *self.study.tasks, *transfer]


def _statistics(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Mean and deviation of every row and measure; GeSSL's presets minus plain, at equal epochs and at equal
    seconds, paired.
    """
    measures, rows = seeds[0][PLAIN], seeds[0]

    def values(row: str, measure: str) -> list[float]:
        return [seed[row][measure] for seed in seeds]

    return {
        "mean": {
            row: {m: studies.summary(values(row, m)) for m in measures if m in rows[row]} for row in rows
        },
        "paired": {
            row: {
                other: {m: studies.paired(values(row, m), values(other, m)) for m in measures}
                for other in (PLAIN, _longer(row))
            }
            for row in rows
            if row.startswith("GeSSL")
        },
    }


def table(title: str, answer: Mapping[str, Any]) -> Table:
    """Means over seeds, and under GeSSL's rows the paired differences to plain training; accuracies in per
    cent, sigma in nats.
    """
    measures = list(answer["mean"][PLAIN])
    found = Table(
        title=f"{title}: mean ± s.d. over {len(answer['seeds'])} seeds; differences paired, with 95 % "
        "intervals"
    )
    for column in ("", *(measure.removesuffix(".accuracy") for measure in measures)):
        found.add_column(column)
    for row, means in answer["mean"].items():
        found.add_row(row, *(_spread(measure, means.get(measure)) for measure in measures))
        for other, differences in answer["paired"].get(row, {}).items():
            found.add_row(
                f"  minus {other}", *(_interval(measure, differences[measure]) for measure in measures)
            )
    return found


def _spread(measure: str, found: Mapping[str, float] | None) -> str:
    return "" if found is None else " ± ".join(_number(measure, found[key]) for key in ("mean", "deviation"))


def _interval(measure: str, found: Mapping[str, float]) -> str:
    mean, low, high = (_number(measure, found[key], "+") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(measure: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if measure.endswith("accuracy") else f"{value:{sign}.3f}"


def _longer(variant: str) -> str:
    """The plain runs that take as many seconds as this variant's."""
    return f"plain, as long as {variant.removeprefix('GeSSL, ')}"


def _slug(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "-").lower()


if __name__ == "__main__":
    main()
