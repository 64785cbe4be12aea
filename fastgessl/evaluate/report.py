"""What an evaluation found: one table to read, one dictionary to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastgessl.config import EvaluateConfig

Measurements = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """Measurements of several encoders on the same images."""

    rows: dict[str, Measurements]
    """Row name -> task -> measurement -> value; every row also has "features": {"width": F}."""
    tasks: tuple[str, ...]
    """Tasks that were run."""
    skipped: dict[str, str]
    """Tasks that the data does not allow -> why. Empty if tasks were asked for by name."""
    images: dict[str, int]
    """Images in train and test, classes (0 without labels), and under held_out 1 if the test images were taken from the training images."""
    settings: EvaluateConfig

    def table(self) -> Table:
        """The rows side by side; one column a measurement, k and T and the metric of k-NN in its heading."""
        columns = [column for task in self.tasks for column in _columns(task, self.settings) if self._measured(task, column)]
        table = Table(title=self._title(), caption=self._caption() or None, caption_justify="left", title_justify="left", box=SIMPLE_HEAD)
        table.padding = (0, 0)
        table.add_column("encoder")
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        for name, row in self.rows.items():
            table.add_row(f"{name} ({row['features']['width']})", *(column.show(row[column.task]) for column in columns))
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything as plain strings, integers, floats and lists; null for what is infinite."""
        return _plain(
            {
                "rows": self.rows,
                "tasks": list(self.tasks),
                "skipped": self.skipped,
                "images": self.images,
                "settings": self.settings.model_dump(),
            }
        )

    def _measured(self, task: str, column: Column) -> bool:
        return all(column.needs in row[task] for row in self.rows.values())

    def _title(self) -> str:
        if self.images["classes"] == 0:
            return f"Frozen features: {self.images['train']} images without labels"
        source = "held out of the training images" if self.images["held_out"] else "test"
        return f"Frozen features: {self.images['train']} training images, {self.images['test']} {source}, {self.images['classes']} classes"

    def _caption(self) -> str:
        reasons: dict[str, list[str]] = {}
        for task, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(task)
        lines = [f"not run: {', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()]
        unsettled = [f"{name}: {task}" for name, row in self.rows.items() for task in row if row[task].get("converged") is False]
        return "\n".join(lines + [f"the fit stopped before it converged: {place}" for place in unsettled])


@dataclass(frozen=True)
class Column:
    """A column of the table: of which task, which measurement it needs, and how a cell is written."""

    task: str
    heading: str
    needs: str
    show: Callable[[dict[str, Any]], str]


def _columns(task: str, settings: EvaluateConfig) -> list[Column]:
    few = f"{settings.labels_per_class} labels\na class\n%"
    knn = f"k-NN\ncosine\nk {settings.knn_k}\nT {settings.knn_temperature:g}\n%"
    every = [
        Column("linear", "linear\n%", "accuracy", lambda m: f"{100 * m['accuracy']:.1f}"),
        Column("few_labels", few, "accuracy", lambda m: f"{100 * m['accuracy']:.1f}±{100 * m['deviation']:.1f}"),
        Column("knn", knn, "accuracy", lambda m: f"{100 * m['accuracy']:.1f}"),
        Column("sigma", "σ\ntrain", "discriminability", lambda m: f"{m['discriminability']:.3f}"),
        Column("sigma", "σ\ntest", "generalisation", lambda m: f"{m['generalisation']:.3f}"),
        Column("geometry", "eff.\nrank", "effective_rank", lambda m: f"{m['effective_rank']:.1f}"),
        Column("geometry", "align", "alignment", lambda m: f"{m['alignment']:.3f}"),
        Column("geometry", "unif.", "uniformity", lambda m: f"{m['uniformity']:.2f}"),
        Column("geometry", "view\nfound\n%", "retrieval", lambda m: f"{100 * m['retrieval']:.1f}"),
        Column("geometry", "crowd.", "crowding", lambda m: f"{m['crowding']:.2f}"),
    ]
    return [column for column in every if column.task == task]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
