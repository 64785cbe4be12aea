"""HTML tables. Every cell and heading is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from fastgessl.config import Config, EvaluateConfig, flat
from fastgessl.evaluate.report import Report


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column names the rows; it scrolls sideways where the screen is narrow.

    >>> "<th>a&lt;b</th>" in table(["a<b"], [["x"]])
    True
    """
    head = "".join(f"<th>{_lines(text)}</th>" for text in headings)
    body = "".join(
        f'<tr><th scope="row">{_lines(first)}</th>{"".join(f"<td>{_lines(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    # Above the table: a <caption> would be folded to the width of a narrow one.
    title = f'<p class="caption">{_lines(caption)}</p>' if caption else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def evaluation_tables(evaluation: dict[str, Any]) -> str:
    """What `fastgessl evaluate` printed, from evaluation.json: feature tasks, transfer, universality,
    learning, fine-tuning.
    """
    parts = [_feature_table(evaluation, "")]
    parts += [_feature_table(found, name) for name, found in evaluation.get("transfer", {}).items()]
    parts += [_finetune(evaluation["finetune"])] if evaluation.get("finetune") else []
    return "".join(parts)


def report_of(evaluation: dict[str, Any], data: str = "") -> Report:
    """The `Report` that evaluation.json was written from; null, which stands for what is infinite, is
    infinite again.
    """
    rows = {
        row: {
            task: {
                key: float("inf") if value is None and key == "crowding" else value
                for key, value in found.items()
            }
            for task, found in tasks.items()
        }
        for row, tasks in evaluation["rows"].items()
    }
    known = {
        key: value for key, value in evaluation["settings"].items() if key in EvaluateConfig.model_fields
    }
    return Report(
        rows,
        tuple(evaluation["tasks"]),
        evaluation["skipped"],
        evaluation["images"],
        EvaluateConfig(**known),
        data,
    )


def _feature_table(evaluation: dict[str, Any], name: str) -> str:
    if not evaluation.get("rows") or not evaluation.get("tasks"):
        return ""
    report = report_of(evaluation, name)
    return "".join(
        table(headings, rows, report.title() if number == 0 else "")
        for number, (headings, rows) in enumerate(report.cells())
        if rows
    )


def _finetune(rows: dict[str, list[dict[str, Any]]]) -> str:
    shares = [
        f"{100 * each['fraction']:g} % labels\n({each['labelled']} images)"
        for each in next(iter(rows.values()))
    ]
    cells = [[name, *(f"{100 * each['accuracy']:.1f} %" for each in found)] for name, found in rows.items()]
    return table(["fine-tuned", *shares], cells, "Accuracy after fine-tuning the encoder itself")


def universality_tables(evaluation: dict[str, Any]) -> str:
    """σ of every task and the learning universality, where they were measured; else what would measure them."""
    measured = evaluation.get("universality")
    parts = [_universality(measured)] if measured else []
    if not parts and "sigma" in evaluation.get("tasks", ()):
        groups = ("discriminability", "generalisation")
        cells = [
            [name, *(f"{row['sigma'][group]:.3f}" for group in groups)]
            for name, row in evaluation["rows"].items()
        ]
        parts.append(
            table(
                ["encoder", *groups], cells, "σ of a linear probe against the labels, nats; low is universal"
            )
        )
    if evaluation.get("learning"):
        points = evaluation["learning"]
        cells = [_learning_row(point) for point in points]
        caption = f"Learning universality on {points[0]['tasks']} held-out mini-batches"
        parts.append(
            table(["step", "σ to the task-specific copy", "SSL loss here", "of the copy"], cells, caption)
        )
    return (
        "".join(parts)
        or '<p class="none">Not measured: <code>fastgessl evaluate RUN --tasks universality '
        "learning</code></p>"
    )


def _learning_row(point: dict[str, Any]) -> list[str]:
    losses = [f"{point[key]:.3f}" for key in ("loss_before", "loss_after")]
    return [str(point["step"]), f"{point['sigma']:.4f} ± {point['deviation']:.4f}", *losses]


def _universality(measured: dict[str, Any]) -> str:
    rows = measured["rows"]
    tasks = next(iter(rows.values()))["tasks"]
    headings = ["encoder", *(f"{task['task']}\n{task['group']}" for task in tasks), "sum"]
    cells = [
        [
            name,
            *(f"{task['sigma']:.3f}\n({100 * task['accuracy']:.1f} %)" for task in found["tasks"]),
            f"{found['total']:.3f}",
        ]
        for name, found in rows.items()
    ]
    return table(
        headings,
        cells,
        f"σ against {measured['target']}, nats (accuracy of the same probe); low is universal",
    )


def configuration(config: Config) -> str:
    """Every option, a table a section; what differs from the default is marked."""
    parts = []
    for section, values in config.model_dump(mode="json").items():
        if not isinstance(values, dict):
            continue
        defaults = flat(getattr(Config(), section).model_dump(mode="json"))
        rows = "".join(
            f"<tr{' class=changed' if value != defaults[key] else ''}><th "
            f'scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
            for key, value in flat(values).items()
        )
        parts.append(
            f"<details><summary>{escape(section)}</summary><div "
            f"class=scroll><table><tbody>{rows}</tbody></table></div></details>"
        )
    return f'<p>Recipe <b>{escape(config.recipe)}</b>. Marked values differ from the default.</p><div class="options">{"".join(parts)}</div>'
