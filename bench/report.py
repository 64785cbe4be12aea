"""docs/benchmarks.md from everything under bench/results/: `python -m bench.report [--results DIR] [--to
docs/benchmarks.md]`.

The newest file of each name and machine is shown, with the commit, versions and date that made it; trainers'
rates and the losses' times are plotted beside the page. A number that is not in a file is not on the page.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench import results

ABOUT = {
    "gpu-ceilings": "What the device can do at best, as measured.",
    "gpu-tests": "Every kernel on the device against float64.",
    "gpu-kernels": "The similarity losses, forward and backward unless said, beside floors, targets and "
    "peers.",
    "gpu-steps": "Whole training steps, loader included, beside other trainers in the same run.",
    "gpu-engines": "The input engines alone.",
    "gpu-quality": "Short runs of the real command.",
    "gpu-gessl": "A step of GeSSL's modes, x a plain step.",
    "gpu-scaling": "Collectives on several ranks.",
    "steps": "Whole training steps, loader included, beside other trainers in the same run.",
    "gessl": "A step of GeSSL's modes, x a plain step.",
    "hypergradients": "Gradients of σ against those of exact mode, SimCLR on digits: cosine and ratio of "
    "norms, mean ± s.d. over seeds.",
    "does-gessl-help-digits": "Plain training against GeSSL's presets, mean ± s.d. over seeds; differences "
    "paired, with 95 % intervals.",
    "does-gessl-help-cifar10-small": "The same on a tenth of CIFAR-10, 16-pixel views, a quarter of the "
    "width.",
    "dsa-digits": "DSA against plain and supervised training, with outliers among the training images; mean "
    "± s.d. over seeds.",
    "evaluate": "Extraction (medians of rounds in turns), probe and k-NN (one call each) beside "
    "scikit-learn and lightly, 50,000 + 10,000 "
    "images of 32 pixels, 512 features.",
    "evaluation-tables": "The tables that evaluation.md shows, one seed; they stand there.",
    "ladder-digits": "The levers of the idealised representations, one after the other; mean ± s.d. over "
    "seeds.",
    "methods-digits": "Every method's digits recipe, beside raw pixels and the untrained encoder; mean ± "
    "s.d. over seeds.",
    "kernels": "The losses beside dense PyTorch and other packages; seconds are the best round's, whose "
    "rates are beside; above 4,096 rows "
    "one call.",
    "kernels-rows": "The losses beside dense PyTorch and other packages, at chosen sizes.",
    "pipelines": "The engines that make views, side by side, in turns.",
    "pipelines-part": "The engines that make views, side by side, on a part of the inputs.",
}
HIDDEN = {"samples", "output", "trace", "state_before", "state_after", "split", "draws"}
"""What a file keeps and a page does not show: single samples, logs."""
ROW_LIMIT = 60
Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results.ROOT / "results")
    parser.add_argument("--to", type=Path, default=results.ROOT.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args(argv)
    arguments.to.write_text(page(arguments.results, arguments.to.parent))
    print(arguments.to)


def page(folder: Path, beside: Path) -> str:
    """The Markdown; plots are written to `beside`/benchmarks-<machine>-<name>.png."""
    files = newest(folder)
    machines = sorted({path.parent.name for path in files.values()})
    text = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report` from the files it names. Contenders of one table ran in one "
        "process or one after the other, "
        "in turns where rounds are given; a ratio is the median over rounds. A time is the best or the "
        "median of its samples, as each "
        "section says.",
    ]
    if all(machine.startswith("cpu") for machine in machines):
        text += [
            "",
            "**Nothing here was measured on a GPU yet**, and so nothing is said about several GPUs. `make "
            "gpu` measures both.",
        ]
    for machine in machines:
        text += ["", f"## {machine}"]
        for (place, name), path in files.items():
            if place == machine:
                text += section(name, path, beside)
    return "\n".join(text) + "\n"


def newest(folder: Path) -> dict[tuple[str, str], Path]:
    """The last file of each (machine, name), by its date; dry runs are no results."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text())
        if not record.get("dry_run"):
            found[path.parent.name, record["name"]] = path
    return dict(sorted(found.items()))


def section(name: str, path: Path, beside: Path) -> list[str]:
    """One file: where it comes from, its tables, its plot."""
    record = _with_spreads(json.loads(path.read_text()))
    link = os.path.relpath(path, beside)
    versions = record.get("versions", {})
    machine = ", ".join(record["gpus"]) or record["processor"]
    origin = f"{record['started'][:10]}, commit {record['commit']}, torch {versions.get('torch')}, {machine}"
    text = [
        "",
        f"### {name}",
        "",
        f"{ABOUT.get(name, '')} [{path.name}]({link}): {origin}, {record['threads']} threads.".strip(),
    ]
    if record.get("complete") is False:
        text += ["", "**Cut**: the run ended before its last row."]
    found = list(tables(record))
    for title, rows in found:
        text += ["", *([f"**{title}**", ""] if title else []), *markdown(rows)]
    if not found:
        numbers = {key: value for key, value in _plain(record).items() if key not in results.ORIGIN}
        text += ["", *markdown([{"": key, "value": value} for key, value in numbers.items()])]
    plot = _plot(name, record, beside / f"benchmarks-{path.parent.name}-{name}.png")
    return text + (["", f"![{name}]({plot.name})"] if plot else [])


def tables(tree: Any, title: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every collection of rows in a record, with the names that lead to it."""
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        rows = _rows(value)
        if key in HIDDEN or key in ("versions", "study"):
            continue
        inner = title if key in ("rows", "contenders") else f"{title}, {key}".lstrip(", ")
        if rows:
            yield inner, rows
        nested = value.items() if isinstance(value, Mapping) else ()
        for name, row in nested:
            deeper = f"{inner}, {name}".lstrip(", ")
            if rows := _rows(row):
                yield deeper, rows
            else:
                yield from tables(row, deeper)


def _rows(value: Any) -> list[dict[str, Any]]:
    """Rows of a list of dictionaries or of a dictionary of them, each with its plain values; none if there
    are no such values.
    """
    if isinstance(value, Mapping) and value and all(isinstance(row, Mapping) for row in value.values()):
        found = [{"": name} | _plain(row) for name, row in value.items()]
    elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        found = [_plain(row) for row in value]
    else:
        return []
    return found if any(len(row) > 1 for row in found) else []


def _plain(row: Row) -> dict[str, Any]:
    return {
        key: value
        for key, value in row.items()
        if key not in HIDDEN and (value is None or isinstance(value, str | int | float))
    }


def _with_spreads(tree: Any) -> Any:
    """The record with statistics over seeds as one cell each."""
    if isinstance(tree, list):
        return [_with_spreads(part) for part in tree]
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {"mean", "deviation"}:
        return f"{tree['mean']:.3f} ± {tree['deviation']:.3f}"
    if set(tree) == {"mean", "low", "high"}:
        return f"{tree['mean']:+.3f} [{tree['low']:+.3f}, {tree['high']:+.3f}]"
    return {key: _with_spreads(part) for key, part in tree.items()}


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table; columns in the order in which rows bring them up, those without a value anywhere left out."""
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if any(row.get(column) is not None for row in rows)
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(_cell(column, row.get(column)) for column in columns) + " |"
        for row in rows[:ROW_LIMIT]
    ]
    return lines + (
        [f"\n{len(rows) - ROW_LIMIT} more rows are in the file."] if len(rows) > ROW_LIMIT else []
    )


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")[:80]


def _plot(name: str, record: Row, path: Path) -> Path | None:
    """Source images a second of every trainer, case by case; None where a file has no such rows."""
    cases = record.get("cases") or (record.get("rows") if name == "gpu-steps" else None)
    if not cases:
        return None
    shown = {case: found["rows"] for case, found in cases.items() if "rows" in found}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), squeeze=False)
    for axis, (case, rows) in zip(axes[0], shown.items(), strict=True):
        rates = {
            trainer: row["images_per_second"] for trainer, row in rows.items() if "images_per_second" in row
        }
        axis.barh(
            list(rates),
            list(rates.values()),
            color=["#2a6f97" if "our" in trainer or "GeSSL" in trainer else "#a9a9a9" for trainer in rates],
        )
        axis.invert_yaxis()
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("source images / s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
