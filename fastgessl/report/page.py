"""One self-contained HTML page on a run, or on several: styles, script and pictures are inside, nothing is
fetched.
"""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from fastgessl import pipelines, runs
from fastgessl.distributed import build_accelerator
from fastgessl.evaluate.subject import open_subject
from fastgessl.report.comparison import Kind, comparison_cells, kinds_of
from fastgessl.report.curves import line_chart
from fastgessl.report.gallery import Gallery
from fastgessl.report.record import Record, read_record
from fastgessl.report.tables import configuration, evaluation_tables, table, universality_tables
from fastgessl.report.throughput import bar, measure_split

# (key in metrics.jsonl or timing.jsonl, title, unit)
CURVES = (
    ("loss", "loss", ""),
    ("loss_ssl", "SSL loss", ""),
    ("sigma", "σ", "nats"),
    ("delta_loss", "ΔL = L(teacher) − L", ""),
    ("lr", "learning rate", ""),
    ("images_per_second", "images a second", ""),
    ("effective_rank", "effective rank", ""),
    ("knn", "k-NN accuracy", ""),
)


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page on these runs, `report.html` in the first one's folder if `out` is not given; returns
    the file.

    Several runs are compared first; the pictures are those of the first. UsageError for a folder that is no
    run.
    """
    records = [read_record(folder) for folder in folders]
    kinds = kinds_of(records)
    sections = [("comparison", "Comparison", _comparison(kinds))] if len(records) > 1 else []
    sections.append(("curves", "Curves", _curves(kinds)))
    pictured, styles, points = _pictures(records[0])
    sections += _measured(records[0]) + pictured
    sections.append(("configuration", "Configuration", configuration(records[0].config)))
    path = out or folders[0] / "report.html"
    runs.write_bytes(path, _page(records, sections, styles, points).encode())
    return path


def _page(
    records: list[Record], sections: list[tuple[str, str, str]], styles: str, points: list[dict[str, Any]]
) -> str:
    first = records[0]
    title = first.name if len(records) == 1 else f"{len(records)} runs"
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>{content}</section>' for key, name, content in sections
    )
    versions = first.environment.get("versions", {})
    facts = [
        first.config.recipe,
        f"{first.last_step} steps",
        f"seed {first.config.train.seed}",
        str(first.environment.get("started", "")),
    ]
    facts += [f"{package} {versions[package]}" for package in ("fastgessl", "torch") if package in versions]
    read = resources.files("fastgessl.report")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be fetched, whatever a file's name or a label holds.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{(read / 'page.css').read_text()}{styles}</style></head><body>"
        f"<h1>{escape(title)}</h1><p "
        f'class="lead">{escape(" · ".join(fact for fact in facts if fact))}</p><nav>{links}</nav>{body}'
        '<div id="tip"><span class="picture thumb"></span><b></b><span></span></div>'
        f'<script type="application/json" id="points">{_embedded(points)}</script>'
        f"<script>{(read / 'page.js').read_text()}</script></body></html>\n"
    )


def _embedded(values: Any) -> str:
    """JSON that no HTML parser reads as anything else."""
    return json.dumps(values).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _comparison(kinds: list[Kind]) -> str:
    headings, rows = comparison_cells(kinds)
    about = "Mean ± s.d. over seeds. Differences are paired over the seeds that both have; in brackets the 95 % interval (Student's t)."
    return f"<p>{about}</p>" + table(headings, rows)


def _curves(kinds: list[Kind]) -> str:
    """A chart a quantity, a line a run; runs that differ by their seed alone share a colour."""
    several = len(kinds) > 1 or len(kinds[0].by_seed) > 1
    named = {
        (f"{kind.name}, seed {seed}" if several else record.name): (number, record)
        for number, kind in enumerate(kinds)
        for seed, record in kind.by_seed.items()
    }
    colours = {name: number for name, (number, _) in named.items()}
    charts = [
        line_chart(title, {name: record.series(key) for name, (_, record) in named.items()}, unit, colours)
        for key, title, unit in CURVES
    ]
    keys = "".join(
        f'<li><span class="key c{number % 10}"></span>{escape(kind.name)}</li>'
        for number, kind in enumerate(kinds)
    )
    legend = f'<ul class="legend">{keys}</ul>' if several else ""
    hint = "" if any(record.series("effective_rank")[0] for _, record in named.values()) else _rank_hint()
    return f'{legend}<div class="charts">{"".join(charts)}</div>{hint}'


def _rank_hint() -> str:
    return '<p class="lead">Effective rank and k-NN along the way: train with <code>--evaluate.every_epochs 5</code>.</p>'


def _measured(record: Record) -> list[tuple[str, str, str]]:
    if not record.evaluation:
        missing = '<p class="none">This run has not been trained to its end, so nothing of it has been measured.</p>'
        return [("evaluation", "Evaluation", missing)]
    return [
        ("evaluation", "Evaluation", evaluation_tables(record.evaluation)),
        ("universality", "Universality", universality_tables(record.evaluation)),
    ]


def _pictures(record: Record) -> tuple[list[tuple[str, str, str]], str, list[dict[str, Any]]]:
    """The sections that need images and encoder, their styles, and the points of the map."""
    config = record.config
    accelerator = build_accelerator(config, record.folder)
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None  # only a test split can be absent
    split = [("throughput", "Where the time goes", bar(measure_split(config, images, accelerator)))]
    if not (record.folder / "encoder.safetensors").is_file():
        return split, "", []
    test = pipelines.open_images(config.data.name, config.data.root, "test")
    gallery = Gallery(open_subject(str(record.folder), config), images, test, accelerator)
    sections = [
        ("views", "Views", gallery.view_grid()),
        ("map", "Map of the features", gallery.embedding_map()),
        ("neighbours", "Nearest neighbours", gallery.neighbours()),
        ("confusion", "Confusions", gallery.confusion()),
    ]
    return sections + split, gallery.styles(), gallery.points()
