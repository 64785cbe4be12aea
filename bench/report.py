"""Write docs/benchmarks.md from everything under bench/results/: `python -m bench.report [--to FILE]`.

The newest file of each name and machine is shown, with the commit, versions and date that made it; steps are
plotted beside the page. A number that is not in a file is not on the page.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.results import RESULTS, ROOT

ABOUT = {
    "losses": "Similarity losses beside dense PyTorch and other packages.",
    "kernels": "Losses with their backward beside other ways to compute them; best of the rounds.",
    "steps": "Whole training steps, loader included, beside other trainers.",
    "views": "Engines and kernels that make views.",
    "pipelines": "CPU milliseconds per image of the engines that make views; more in [data.md](data.md).",
    "gessl": "A step of GeSSL's modes, as multiples of a plain step.",
    "gessl-curve": "σ over training; [gessl.md](gessl.md) shows it.",
    "hypergradients": "Cosine of σ's gradient with exact mode's, K = 1; more in [gessl.md](gessl.md).",
    "evaluation": "Evaluation beside scikit-learn and lightly.",
    "evaluate": "Seconds beside scikit-learn and lightly, 50,000 + 10,000 images, 512 features.",
    "evaluation-tables": "The tables that [evaluation.md](evaluation.md) shows.",
    "does-gessl-help-digits": "Plain training and GeSSL's presets, accuracy in %.",
    "does-gessl-help-cifar10-small": "The same on a tenth of CIFAR-10 at 16 pixels, a quarter of the width.",
    "dsa-digits": "DSA against plain and supervised training, with outliers among the training images.",
    "ladder-digits": "The levers of the idealised representations, one after the other.",
    "methods-digits": "Every method's digits recipe.",
}
ROW_LIMIT = 20
Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args(argv)
    arguments.to.write_text(page(arguments.results, arguments.to.parent))
    print(arguments.to)


def page(folder: Path, beside: Path) -> str:
    """The Markdown; plots are written to `beside`/benchmarks-<machine>-<name>.png."""
    files = newest(folder)
    machines = sorted({machine for machine, _ in files})
    text = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report` from the files it names. Contenders of one row took turns in "
        "one process; × is the median over rounds of the time as a multiple of the first column's.",
    ]
    if all(machine.startswith("cpu") for machine in machines):
        text += ["", "**Nothing here was measured on a GPU yet.** `make gpu` does."]
    for machine in machines:
        text += ["", f"## {machine}"]
        for (place, name), path in files.items():
            if place == machine:
                text += ["", f"### {name}", "", *section(path, beside)]
    return "\n".join(text) + "\n"


def newest(folder: Path) -> dict[tuple[str, str], Path]:
    """The last file of each (machine, name), by its date; what was only tried out is no result."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text())
        if "name" in record and not record.get("tiny"):
            found[path.parent.name, record["name"]] = path
    return dict(sorted(found.items()))


def section(path: Path, beside: Path) -> list[str]:
    """One file: what it is about, where it comes from, its tables, its plot."""
    record = json.loads(path.read_text())
    name, machine = record["name"], ", ".join(record["gpus"]) or record["processor"]
    origin = (
        f"{record['started'][:10]}, commit {record['commit']}, torch {record['versions']['torch']}, {machine}"
    )
    link = f"[{path.name}]({os.path.relpath(path, beside)})"
    text = [f"{ABOUT.get(name, '')} {link}: {origin}, threads: {record['threads']}.".strip()]
    if record.get("complete") is False:
        text += ["", "**Cut**: the run ended before its last row."]
    for title, rows in tables(record):
        text += ["", *([f"**{title}**", ""] if title else []), *markdown(rows)]
    plot = beside / f"benchmarks-{path.parent.name}-{name}.png"
    return text + (["", f"![{name}]({plot.name})"] if plotted(record, plot) else [])


def tables(record: Row) -> Iterator[tuple[str, list[Row]]]:
    """What the page shows of a file: (title, rows)."""
    if record["name"] in DIGESTS and "cases" not in record:
        yield "", DIGESTS[record["name"]](record)
    if "mean" in record:
        yield "", means(record["mean"])
    for title, answer in record.get("answers", {}).items():
        yield title, means(answer["mean"])
    contests: list[Row] = []
    for title, case in record.get("cases", {}).items():
        first = next(iter(case["rows"].values()), {})
        if "seconds" in first:
            contests.append(contest(title, case["rows"]))
        elif any(isinstance(value, Mapping) for value in first.values()):
            yield title, means(case["rows"])
    if contests:
        yield "", contests


def contest(title: str, rows: Mapping[str, Row]) -> Row:
    """The first contender's milliseconds, and the others' time as a multiple of them."""
    (ours, first), *others = rows.items()
    multiples = {
        name: f"× {row.get('ratio_to_ours', row['seconds'] / first['seconds']):.2f}"
        for name, row in others
        if "seconds" in row
    }
    return {"": title, ours: milliseconds(first["seconds"])} | multiples


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def means(rows: Mapping[str, Row]) -> list[Row]:
    """Mean±deviation over seeds, accuracies in per cent; sigmas stay in the file."""
    return [
        {"": name}
        | {
            measure.removesuffix(".accuracy"): spread(measure, value)
            for measure, value in row.items()
            if not measure.startswith("sigma")
        }
        for name, row in rows.items()
    ]


def spread(measure: str, value: Row) -> str:
    accuracy = measure in ("linear", "few_labels", "knn") or measure.endswith("accuracy")
    scale, digits = (100, 1) if accuracy else (1, 3)
    return f"{scale * value['mean']:.{digits}f}±{scale * value['deviation']:.{digits}f}"


def kernels(record: Row) -> list[Row]:
    """Backward at 1,024 and 4,096 rows."""
    grouped: dict[str, dict[str, Row]] = {}
    for row in record["rows"]:
        if row["pass"] == "backward" and row["rows"] in (1024, 4096):
            ranks = f", {row['ranks']} ranks" if "ranks" in row else ""
            grouped.setdefault(f"{row['loss']}, {row['rows']}{ranks}", {})[row["peer"]] = row
    return [contest(title, rows) for title, rows in grouped.items()]


def gessl(record: Row) -> list[Row]:
    found = []
    for name, row in record["rows"].items():
        ratios = {key: f"{row[f'{key}_ratio']:.2f}" for key in ("operations", "seconds", "peak")}
        found.append({"": name} | ratios)
    return found


def hypergradients(record: Row) -> list[Row]:
    return [
        {"network": row["network"], "α": row["alpha"]}
        | {mode: spread("", row[f"{mode}, cosine"]) for mode in ("first_order", "finite_difference")}
        for row in record["rows"]
        if (row["precision"], row["scope"], row["K"]) == ("float32", "all", 1)
    ]


def pipelines(record: Row) -> list[Row]:
    found: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        title = f"{row['data']}, {row['views']}"
        found.setdefault(title, {"": title})[row["engine"]] = f"{row['cpu_ms_per_image']:.3g}"
    return list(found.values())


def evaluate(record: Row) -> list[Row]:
    keys = ("probe", "sklearn_one_fit", "knn", "knn_lightly", "knn_sklearn")
    return [{"": key, "seconds": f"{record[f'{key}_seconds']:.1f}"} for key in keys]


DIGESTS = {
    "kernels": kernels,
    "gessl": gessl,
    "hypergradients": hypergradients,
    "pipelines": pipelines,
    "evaluate": evaluate,
}
"""Of files with a shape of their own."""


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table; columns in the order in which rows bring them up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows[:ROW_LIMIT]:
        lines.append("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
    more = len(rows) - ROW_LIMIT
    return lines + ([f"\n{more} more rows are in the file."] if more > 0 else [])


def plotted(record: Row, path: Path) -> bool:
    """Draw source images per second of every trainer, case by case; False where a file has no such rows."""
    shown: dict[str, dict[str, float]] = {}
    for title, case in record.get("cases", {}).items():
        for name, row in case["rows"].items():
            if "images_per_second" in row:
                shown.setdefault(title, {})[name] = row["images_per_second"]
    if not shown:
        return False
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), squeeze=False)
    for axis, (title, rates) in zip(axes[0], shown.items(), strict=True):
        colors = ["#2a6f97" if "our" in name or "GeSSL" in name else "#a9a9a9" for name in rates]
        axis.barh(list(rates), list(rates.values()), color=colors)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("source images / s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
