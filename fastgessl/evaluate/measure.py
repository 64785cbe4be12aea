"""Several encoders on the same images: every task of frozen features that the data allows."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from rich.console import Group
from torch import nn

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.features import (
    Pixels,
    RowFeatures,
    extract_features,
    extract_views,
    on_first_rank,
    view_sample,
    with_progress,
)
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.sources import DataFacts, held_out_test, unusable_labels
from fastgessl.evaluate.tables import Column, Table
from fastgessl.evaluate.tasks import TASKS, plan_tasks, wanted_tasks
from fastgessl.evaluate.tasks.geometry import effective_rank
from fastgessl.evaluate.tasks.knn import knn_classify


@dataclass(frozen=True)
class EvaluationData:
    """Loaders of one data set; each yields every image once, with `.views`, `.index` and `.label`."""

    train: Iterable[Any]
    """One view per image, without augmentation."""
    test: Iterable[Any] | None = None
    """The same for the test split; without one, a stratified fifth of the labelled training images is held
    out."""
    views: Iterable[Any] | None = None
    """Two augmented views per image, for geometry."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of several encoders on the same images."""

    rows: dict[str, dict[str, dict[str, Any]]]
    """Row name -> task -> measurement -> value; every row also has "features": {"width": F}."""
    tasks: tuple[str, ...]
    """Tasks that were run."""
    skipped: dict[str, str]
    """Tasks that the data does not allow -> why. Empty if tasks were asked for by name."""
    images: dict[str, int]
    """Images in train and test, classes (0 without labels), and under held_out 1 if the test images were
    taken from the training images."""
    settings: EvaluateConfig

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Evaluation":
        """As `to_json` wrote it; options of another version are passed over."""
        known = EvaluateConfig.model_fields.keys() & found["settings"].keys()
        settings = EvaluateConfig(**{key: found["settings"][key] for key in known})
        return Evaluation(found["rows"], tuple(found["tasks"]), found["skipped"], found["images"], settings)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain strings, integers, floats and lists; null for what is infinite."""
        return as_json(vars(self))

    def table(self) -> Group:
        """The tables as rich prints them."""
        return Group(*(table.terminal() for table in self.tables()))

    def tables(self, data: str = "") -> list[Table]:
        """The rows side by side, a column per measurement; a table for each place that tasks have. `data` is
        the data set's name, for the title.
        """
        groups: dict[int, list[tuple[str, Column]]] = {}
        for task in TASKS.values():
            for column in task.columns(self.settings) if task.name in self.tasks else ():
                if all(column.needs in row[task.name] for row in self.rows.values()):
                    groups.setdefault(task.place[0], []).append((task.name, column))
        tables = []
        for columns in groups.values():
            rows = [
                [
                    f"{name} ({row['features']['width']})",
                    *(column.show(row[task]) for task, column in columns),
                ]
                for name, row in self.rows.items()
            ]
            tables.append(Table(["encoder", *(column.heading for _, column in columns)], rows))
        if tables:
            tables[0] = replace(tables[0], title=self._title(data))
            tables[-1] = replace(tables[-1], notes=self._notes())
        return tables

    def _title(self, data: str) -> str:
        subject = f"Frozen features, {data}" if data else "Frozen features"
        if self.images["classes"] == 0:
            return f"{subject}: {self.images['train']} images without labels"
        source = "held out of the training images" if self.images["held_out"] else "test"
        return (
            f"{subject}: {self.images['train']} training images, {self.images['test']} {source}, "
            f"{self.images['classes']} classes"
        )

    def _notes(self) -> str:
        reasons: dict[str, list[str]] = {}
        for task, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(task)
        lines = [f"not run: {', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()]
        for name, row in self.rows.items():
            stopped = [task for task in row if row[task].get("converged") is False]
            lines += [f"the fit stopped before it converged: {name}: {task}" for task in stopped]
        return "\n".join(lines)


def tables_of(evaluation: Mapping[str, Any]) -> Iterator[Table]:
    """Every table of an evaluation.json: the run's own data, the transfer sets, the tasks with tables of
    their own.
    """
    named = [("", evaluation), *evaluation.get("transfer", {}).items()]
    for name, found in named:
        if found.get("rows"):
            yield from Evaluation.from_json(found).tables(name or evaluation.get("data", ""))
    for name, task in TASKS.items():
        if task.tables and evaluation.get(name):
            yield from task.tables(evaluation[name])


def evaluate(
    rows: Mapping[str, nn.Module | Literal["pixels"]],
    data: EvaluationData,
    settings: EvaluateConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Evaluation:
    """Measure every row (an encoder on `device`, or "pixels") on the same images and splits.

    With several ranks every rank calls this and gets the same result; the ranks share the extraction, and
    rank 0 runs the probes. Raises UsageError for an unknown task, a task asked for by name that the data does
    not allow, and features that are NaN; ValueError for a task that takes more than features.

    >>> from types import SimpleNamespace as Batch
    >>> loader = [Batch(views=[torch.rand(20, 3, 4, 4)], index=torch.arange(20), label=torch.arange(20) % 2)]
    >>> found = evaluate({"raw pixels": "pixels"}, EvaluationData(loader), EvaluateConfig(tasks=("linear",)))
    >>> sorted(found.rows["raw pixels"]["linear"])
    ['accuracy', 'converged', 'deviation', 'draws', 'labelled', 'weight_decay']
    """
    wanted = wanted_tasks(settings)
    beyond = [task.name for task in wanted if task.tables]
    if beyond and "all" not in settings.tasks:
        raise ValueError(
            f"Task {beyond[0]} takes the encoder and its images, not loaders. Use `fastgessl evaluate "
            f"--tasks {beyond[0]}`."
        )
    if not any(task.needs_views for task in wanted):
        data = replace(data, views=None)

    def extract(encoder: nn.Module | Literal["pixels"]) -> RowFeatures:
        net, place = (Pixels(), "cpu") if encoder == "pixels" else (encoder, device)
        train = extract_features(net, data.train, place, progress)
        if data.test is not None:
            test = extract_features(net, data.test, place, progress)
        elif train.labels is not None:
            train, test = (train.subset(rows) for rows in held_out_test(train.labels, seed))
        else:
            test = train.subset(train.index[:0])
        views = None if data.views is None else extract_views(net, data.views, place, progress)
        if views is not None:
            if len(views) != 2:
                raise ValueError(
                    f"The loader of augmented views yields {len(views)} views an image; geometry takes two."
                )
            views = tuple(view.subset(view_sample(len(view), seed)) for view in views)
        return RowFeatures(train, test, views, held_out=data.test is None, device=device)

    extracted = {name: extract(encoder) for name, encoder in rows.items()}
    return on_first_rank(lambda: measure(extracted, settings, seed, progress=progress))


def monitor(
    features: RowFeatures, settings: EvaluateConfig, probe: OnlineProbe | None = None
) -> dict[str, float]:
    """The quick look during training: effective rank, and with labels k-NN accuracy and the online probe's,
    if there is one, on the test images.
    """
    measured = {"effective_rank": effective_rank(features.train.features)}
    if unusable_labels(features.train.labels, features.test.labels):
        return measured
    if settings.knn_k <= len(features.train):
        k, temperature = settings.knn_k, settings.knn_temperature
        measured["knn"] = knn_classify(features.train, features.test, k, temperature)
    if probe is not None:
        measured["online_probe"] = probe.accuracy(features.test)
    return measured


def measure(
    rows: Mapping[str, RowFeatures],
    settings: EvaluateConfig,
    seed: int = 0,
    *,
    transfer: bool = False,
    progress: bool = False,
) -> Evaluation:
    """The tasks on features that were extracted before.

    Tasks that need more than features are left out. On a `transfer` set those tasks are measured that say
    something of transfer. Raises UsageError as `evaluate` does.
    """
    for name, features in rows.items():
        for part in (features.train, features.test, *(features.views or ())):
            part.require_finite(f"Row '{name}'")
    sample = next(iter(rows.values()))
    facts = DataFacts(
        sample.train.labels,
        sample.test.labels,
        sample.episodes.labels,
        sample.views is not None,
        max(features.width for features in rows.values()),
    )
    planned, skipped = plan_tasks(settings, facts, transfer=transfer)
    tasks = [task for task in planned if not task.tables]
    found: dict[str, dict[str, dict[str, Any]]] = {
        name: {"features": {"width": features.width}} for name, features in rows.items()
    }
    for name, task in with_progress(
        [(name, task) for name in rows for task in tasks], "measurements", progress
    ):
        found[name][task.name] = task.measure(rows[name], settings, seed)
    return Evaluation(
        found,
        tuple(task.name for task in tasks),
        skipped,
        images={
            "train": len(sample.train),
            "test": len(sample.test),
            "classes": sample.classes,
            "held_out": int(sample.held_out),
        },
        settings=settings,
    )


def as_json(value: Any) -> Any:
    """The value as JSON has it: strings for keys, lists, null for what is infinite or NaN.

    >>> as_json({1: (0.5, float("inf"))})
    {'1': [0.5, None]}
    """
    return json.loads(TypeAdapter(Any).dump_json(value))
