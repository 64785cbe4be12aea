"""What an evaluation found: one table to read, one dictionary to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.knn import PUBLISHED
from fastgessl.evaluate.tasks import DEFAULT_TASKS

Measurements = dict[str, dict[str, Any]]
# What stands in one table; more columns would not fit a terminal.
TABLES = (
    DEFAULT_TASKS,
    ("linear_sgd", "mlp", "knn_protocols", "label_fractions"),
    ("few_shot", "conditions"),
)


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
    """Images in train and test, classes (0 without labels), and under held_out 1 if the test images were
    taken from the training images."""
    settings: EvaluateConfig
    data: str = ""
    """Name of the data set, for the title; empty names none."""

    def table(self) -> Group:
        """The rows side by side, a column a measurement, k and T and the metric of k-NN in its heading; a
        table for each group of tasks.
        """
        tables = []
        for headings, rows in self.cells():
            table = Table(box=SIMPLE_HEAD)
            table.padding = (0, 0)
            table.add_column(headings[0])
            for heading in headings[1:]:
                table.add_column(heading, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        tables[-1].caption, tables[-1].caption_justify = self._caption() or None, "left"
        # Above the table, where a title of a narrow one would be folded to its width.
        return Group(Text(self.title(), style="italic"), *tables)

    def cells(self) -> list[tuple[list[str], list[list[str]]]]:
        """Headings and rows of each group of tasks that was measured, the first cell the encoder; at least
        one group.
        """
        groups = [[column for column in self._columns() if column.task in group] for group in TABLES]
        return [
            (
                ["encoder", *(column.heading for column in columns)],
                [
                    [
                        f"{name} ({row['features']['width']})",
                        *(column.show(row[column.task]) for column in columns),
                    ]
                    for name, row in self.rows.items()
                ],
            )
            for columns in [group for group in groups if group] or [[]]
        ]

    def _columns(self) -> list[Column]:
        return [
            column
            for task in self.tasks
            for column in _columns(task, self.settings)
            if self._measured(task, column)
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain strings, integers, floats and lists; null for what is infinite."""
        return plain(
            {
                "rows": self.rows,
                "tasks": list(self.tasks),
                "skipped": self.skipped,
                "images": self.images,
                "settings": self.settings.model_dump(mode="json"),
            }
        )

    def _measured(self, task: str, column: Column) -> bool:
        return all(column.needs in row[task] for row in self.rows.values())

    def title(self) -> str:
        """What was measured on which images."""
        data = f", {self.data}" if self.data else ""
        if self.images["classes"] == 0:
            return f"Frozen features{data}: {self.images['train']} images without labels"
        source = "held out of the training images" if self.images["held_out"] else "test"
        counts = f"{self.images['train']} training images, {self.images['test']} {source}, {self.images['classes']} classes"
        return f"Frozen features{data}: {counts}"

    def _caption(self) -> str:
        reasons: dict[str, list[str]] = {}
        for task, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(task)
        lines = [f"not run: {', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()]
        unsettled = [
            f"{name}: {task}"
            for name, row in self.rows.items()
            for task in row
            if row[task].get("converged") is False
        ]
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
        Column(
            "few_labels", few, "accuracy", lambda m: f"{100 * m['accuracy']:.1f}±{100 * m['deviation']:.1f}"
        ),
        Column("knn", knn, "accuracy", lambda m: f"{100 * m['accuracy']:.1f}"),
        Column("sigma", "σ\ntrain", "discriminability", lambda m: f"{m['discriminability']:.3f}"),
        Column("sigma", "σ\ntest", "generalisation", lambda m: f"{m['generalisation']:.3f}"),
        Column("geometry", "eff.\nrank", "effective_rank", lambda m: f"{m['effective_rank']:.1f}"),
        Column("geometry", "align", "alignment", lambda m: f"{m['alignment']:.3f}"),
        Column("geometry", "unif.", "uniformity", lambda m: f"{m['uniformity']:.2f}"),
        Column("geometry", "view\nfound\n%", "retrieval", lambda m: f"{100 * m['retrieval']:.1f}"),
        Column("geometry", "crowd.", "crowding", lambda m: f"{m['crowding']:.2f}"),
        Column("linear_sgd", "linear\nSGD\n%", "accuracy", lambda m: f"{100 * m['accuracy']:.1f}"),
        Column("mlp", f"MLP\n{settings.mlp_hidden}\n%", "accuracy", lambda m: f"{100 * m['accuracy']:.1f}"),
        *(
            Column("knn_protocols", _protocol(number), "protocols", _nth("protocols", number))
            for number in range(len(PUBLISHED))
        ),
        *(
            Column("label_fractions", f"{100 * share:g} %\nlabels\n%", "fractions", _nth("fractions", number))
            for number, share in enumerate(settings.label_fractions)
        ),
        *(
            Column("few_shot", f"{settings.ways}-way\n{shots}-shot\n%", "episodes", _nth("episodes", number))
            for number, shots in enumerate(settings.shots)
        ),
        Column("conditions", "variance\nwithin\n%", "variation", lambda m: f"{100 * m['variation']:.1f}"),
        Column(
            "conditions", "dimensions\nof needed", "dimension", lambda m: f"{m['dimension']} of {m['needed']}"
        ),
        Column(
            "conditions", "image\nnamed\n%", "predictability", lambda m: f"{100 * m['predictability']:.1f}"
        ),
    ]
    return [column for column in every if column.task == task]


def _protocol(number: int) -> str:
    protocol = PUBLISHED[number]
    vote = f"T {protocol.temperature:g}" if protocol.temperature else "majority"
    return f"k-NN\n{protocol.metric}\nk {protocol.k}\n{vote}\n%"


def _nth(key: str, number: int) -> Callable[[dict[str, Any]], str]:
    """A cell of the accuracy of the number-th entry, with its deviation or interval if it has one."""

    def show(measured: dict[str, Any]) -> str:
        entry = measured[key][number]
        spread = entry.get("deviation") or entry.get("interval") or 0
        return f"{100 * entry['accuracy']:.1f}" + (f"±{100 * spread:.1f}" if spread else "")

    return show


def plain(value: Any) -> Any:
    """The value as JSON has it: strings for keys, lists, null for what is infinite or NaN.

    >>> plain({1: (0.5, float("inf"))})
    {'1': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
