"""Does GeSSL help? Train plainly and with GeSSL's presets, at equal epochs and at equal seconds, over seeds.

    python -m bench.studies.does_gessl_help --study digits                               on a CPU
    python -m bench.studies.does_gessl_help --study cifar10-small --cifar10 FILE.npz     on a CPU, hours
    python -m bench.studies.does_gessl_help --study cifar10 --cifar10 FILE.npz           on a GPU

alpha and w_sigma of each preset are chosen by the linear probe on a validation split of the training images,
with a seed of their own. Every cell (share of the images, method, variant, seed) is a run of the real command
under --work: a call that is cut by --minutes continues where it stopped. Differences are paired over seeds,
with 95 % intervals.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench import studies
from bench.studies import Cell, OutOfTime

CHOICE_SEED = 1000
PLAIN = "plain"


@dataclass(frozen=True)
class Study:
    """What is trained and how it is judged."""

    data: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    epochs: int
    seeds: int = 5
    presets: tuple[str, ...] = ("fast", "head")
    alphas: tuple[float, ...] = (0.01, 0.03)
    weights: tuple[float, ...] = (0.3, 1.0)
    shares: tuple[float, ...] = (1.0,)
    """Shares of the training images that are pretrained on."""
    options: Mapping[str, object] | None = None


SMALL = {"model.width": 0.25, "views.size": 16, "train.batch_size": 128, "schedule.warmup_epochs": 2}
LARGE = ("linear", "knn", "label_fractions", "few_shot", "universality")
STUDIES = {
    "digits": Study("digits", ("simclr",), ("linear", "few_labels", "knn", "sigma"), 50),
    "cifar10-small": Study(
        "cifar10",
        ("simclr", "byol"),
        ("linear", "few_labels", "knn", "sigma"),
        10,
        shares=(0.1,),
        options=SMALL,
    ),
    "cifar10": Study(
        "cifar10",
        ("simclr", "byol"),
        LARGE,
        200,
        seeds=3,
        alphas=(0.003, 0.01, 0.03),
        weights=(0.3, 1.0, 3.0),
        shares=(1.0, 0.1),
    ),
    "tiny": Study(
        "digits",
        ("simclr",),
        ("knn", "linear"),
        1,
        seeds=2,
        presets=("fast",),
        alphas=(0.01,),
        shares=(0.3,),
        options={"model.width": 0.125},
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser(__doc__, "does-gessl-help")
    parser.add_argument("--study", choices=STUDIES, default="digits")
    parser.add_argument("--cifar10", type=Path, help="an .npz with train_x, train_y, test_x, test_y")
    parser.add_argument("--transfer", nargs="*", default=[], help="further data sets, as --evaluate.transfer")
    parser.add_argument("--methods", nargs="+", help="instead of the study's")
    arguments = parser.parse_args(argv)
    asked = {key: getattr(arguments, key) for key in ("methods", "seeds", "epochs")}
    changed = {key: value for key, value in asked.items() if value is not None}
    study = Study(**(vars(STUDIES[arguments.study]) | changed))
    arrays = studies.arrays_of("npz" if study.data == "cifar10" else study.data, arguments.cifar10)
    folder = arguments.work / arguments.study
    asker = Asker(study, folder, arguments.transfer, time.monotonic() + 60 * arguments.minutes)
    answers: dict[str, Any] = {}
    complete = True
    try:
        for share, method in product(study.shares, study.methods):
            answers[f"{method}, {share:.0%} of the images"] = asker.answer(method, share, arrays)
    except OutOfTime:
        complete = False
    for title, answer in answers.items():
        for variant, differences in answer["paired"].items():
            print(f"{title}: {variant} minus {differences}")
    found = {"study": vars(study), "complete": complete, "answers": answers}
    studies.finish(f"does-gessl-help-{arguments.study}", found, folder, arguments.out)


@dataclass(frozen=True)
class Asker:
    """A study under way: where its runs are and when it must stop."""

    study: Study
    folder: Path
    transfer: Sequence[str]
    deadline: float

    def answer(self, method: str, share: float, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Choose each preset's alpha and w_sigma, then run every variant with every seed."""
        study, folder = self.study, self.folder / f"{share:g}-{method}"
        whole, choice = (
            studies.stored(self.folder / f"{name}-{share:g}.npz", part)
            for name, part in zip(("all", "choice"), studies.parts_of(arrays, share), strict=True)
        )
        plain = f"{study.data}-{method}"
        recipes = {f"GeSSL, {preset}": f"{plain}-gessl-{preset}" for preset in study.presets}
        base = {"train.epochs": study.epochs, **(study.options or {})}
        choices = {variant: self._choose(recipe, folder, choice, base) for variant, recipe in recipes.items()}
        chosen = {variant: base | found["options"] for variant, found in choices.items()}
        ratios, epochs = {}, {}
        for variant, options in chosen.items():
            # It decides how long plain training is at equal seconds.
            config = studies.with_options(
                recipes[variant], {**options, "data.name": "npz", "data.root": whole}
            )
            without = config.model_copy(update={"gessl": config.gessl.model_copy(update={"w_sigma": 0.0})})
            ratios[variant] = studies.kept(
                folder / f"{slug(variant)}-step-time-ratio.json",
                lambda config=config, without=without: studies.step_time_ratio(config, without),
            )
            epochs[as_long_as(variant)] = round(study.epochs * max(1.0, ratios[variant]))
        variants = {PLAIN: base} | {name: base | {"train.epochs": count} for name, count in epochs.items()}
        seeds: list[dict[str, dict[str, float]]] = []
        for seed in range(study.seeds):
            seeds.append({})
            for variant, options in (variants | chosen).items():
                run = folder / f"{slug(variant)}-seed{seed}"
                cell = Cell(run, recipes.get(variant, plain), whole, seed, options)
                rows = studies.rows_of(cell.evaluation(self._judging(), self.deadline))
                own = rows.pop("this run")
                seeds[-1] |= {row: studies.leaves(found) for row, found in rows.items()}
                seeds[-1][variant] = studies.leaves(own)
                print(f"{method} {share:g} seed {seed}: {variant}", file=sys.stderr, flush=True)
        found = {"choices": choices, "step_time_ratio": ratios, "epochs": epochs, "seeds": seeds}
        return found | {"mean": studies.means(seeds), "paired": differences(seeds, recipes)}

    def _choose(self, recipe: str, folder: Path, choice: Path, base: Mapping[str, object]) -> dict[str, Any]:
        """The grid's best by linear accuracy on the validation split, the first of equals."""
        tried: list[dict[str, Any]] = []
        for alpha, weight in product(self.study.alphas, self.study.weights):
            options = {"gessl.inner_lr": alpha, "gessl.w_sigma": weight}
            run = folder / "choice" / f"{recipe}-{alpha:g}-{weight:g}"
            cell = Cell(run, recipe, choice, CHOICE_SEED, {**base, **options})
            found = cell.evaluation(("--evaluate.tasks", "linear"), self.deadline)
            tried.append({"options": options, "linear": found["rows"]["this run"]["linear"]["accuracy"]})
        return {"options": max(tried, key=lambda each: each["linear"])["options"], "tried": tried}

    def _judging(self) -> list[str]:
        transfer = ["--evaluate.transfer", *self.transfer] if self.transfer else []
        return ["--evaluate.tasks", *self.study.tasks, *transfer]


def differences(seeds: Sequence[dict[str, dict[str, float]]], variants: Iterable[str]) -> dict[str, Any]:
    """Each variant minus plain, at equal epochs and at equal seconds, paired over seeds."""
    found: dict[str, Any] = {}
    for variant in variants:
        for other in (PLAIN, as_long_as(variant)):
            found.setdefault(variant, {})[other] = {
                measure: studies.paired(
                    [seed[variant][measure] for seed in seeds], [seed[other][measure] for seed in seeds]
                )
                for measure in seeds[0][PLAIN]
            }
    return found


def as_long_as(variant: str) -> str:
    """The plain runs that take as many seconds as this variant's."""
    return f"plain, as long as {variant.removeprefix('GeSSL, ')}"


def slug(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "-").lower()


if __name__ == "__main__":
    main()
