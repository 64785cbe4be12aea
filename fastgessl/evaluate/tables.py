"""Tables of what goes beyond one data set's frozen features: transfer, fine-tuning, universality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def tables(measured: Mapping[str, Any]) -> Iterator[RenderableType]:
    """A table for each of finetune, universality and learning that was measured."""
    if "finetune" in measured:
        yield _finetune(measured["finetune"])
    if "universality" in measured:
        yield _universality(measured["universality"])
    if "learning" in measured:
        yield _learning(measured["learning"])


def _new(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.padding = (0, 0)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table


def _finetune(rows: Mapping[str, list[dict[str, Any]]]) -> Group:
    shares = next(iter(rows.values()))
    first = shares[0]
    title = f"Fine-tuned, AdamW, {first['epochs']} epochs, layer decay {first['layer_decay']:g}; learning rate chosen on a validation split"
    table = _new(
        "encoder",
        *(f"{100 * share['fraction']:g} % labels\n({share['labelled']} images)\n%" for share in shares),
    )
    for name, found in rows.items():
        table.add_row(name, *(f"{100 * each['accuracy']:.1f}" for each in found))
    return Group(Text(title, style="italic"), table)


def _universality(measured: Mapping[str, Any]) -> Group:
    target = {"labels": "the labels", "supervised": "supervised task models"}[measured["target"]]
    rows = measured["rows"]
    tasks = next(iter(rows.values()))["tasks"]
    title = f"Universality: σ against {target}, nats (accuracy of the same probe, %); low is universal"
    table = _new(
        "encoder",
        *(f"{task['task']}\n{task['group']}\n{task['images']} images" for task in tasks),
        "sum",
    )
    for name, found in rows.items():
        cells = [
            f"{task['sigma']:.3f} ({100 * task['accuracy']:.1f}) {task['probe']}" for task in found["tasks"]
        ]
        table.add_row(name, *cells, f"{found['total']:.3f}")
    accuracies = measured["task_model_accuracy"]
    if accuracies:
        shown = ", ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in accuracies.items())
        table.caption, table.caption_justify = f"test accuracy of the supervised task models: {shown}", "left"
    return Group(Text(title, style="italic"), table)


def _learning(points: list[dict[str, Any]]) -> Group:
    title = f"Learning universality on {points[0]['tasks']} held-out mini-batches: σ to the task-specific copy, nats"
    table = _new("step", "σ", "SSL loss\nhere", "SSL loss\nof the copy", "copies\nconverged")
    for point in points:
        spread = f"{point['sigma']:.4f}±{point['deviation']:.4f}"
        losses = f"{point['loss_before']:.3f}", f"{point['loss_after']:.3f}"
        table.add_row(str(point["step"]), spread, *losses, f"{point['converged']} of {point['tasks']}")
    return Group(Text(title, style="italic"), table)
