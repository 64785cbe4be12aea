"""One self-contained HTML page on a run, or on several: styles, script and pictures are inside, nothing is
fetched.
"""

import json
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from fastgessl import runs
from fastgessl.config import Config, flat
from fastgessl.distributed import build_accelerator
from fastgessl.evaluate.measure import tables_of
from fastgessl.evaluate.sources import open_source
from fastgessl.evaluate.subject import open_subject
from fastgessl.report.curves import line_chart
from fastgessl.report.gallery import Gallery
from fastgessl.report.records import Kind, Record, comparison_table, kinds_of, read_record
from fastgessl.report.throughput import bar, step_times

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


Chapters = list[tuple[str, str, str]]
"""(key, heading, HTML) of each part of the page, to which a link at its top leads."""


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page on these runs, `report.html` in the first one's folder if `out` is not given; returns
    the file.

    Several runs are compared first; the pictures are those of the first. UsageError for a folder that is no
    run.
    """
    records = [read_record(folder) for folder in folders]
    first, kinds = records[0], kinds_of(records)
    chapters: Chapters = [
        ("curves", "Curves", _curves(kinds)),
        ("evaluation", "Evaluation", evaluation_tables(first.evaluation)),
    ]
    if len(records) > 1:
        comparison = (
            "<p>Mean ± s.d. over seeds. Differences are paired over the seeds that both have; in brackets "
            f"the 95 % interval (Student's t).</p>{comparison_table(kinds).html()}"
        )
        chapters.insert(0, ("comparison", "Comparison", comparison))
    source = open_source(first.config.data.name, first.config.data.root)
    accelerator = build_accelerator(first.config, first.folder)
    styles = ""
    points: list[dict[str, Any]] = []
    if (first.folder / "encoder.safetensors").is_file():
        gallery = Gallery(open_subject(str(first.folder), first.config), source, accelerator)
        styles, points = gallery.styles(), gallery.points()
        chapters += [
            ("views", "Views", gallery.view_grid()),
            ("map", "Map of the features", gallery.embedding_map()),
            ("neighbors", "Nearest neighbors", gallery.neighbors()),
            ("confusion", "Confusions", gallery.confusion()),
        ]
    chapters += [
        ("throughput", "Where the time goes", bar(step_times(first.config, source.train, accelerator))),
        ("configuration", "Configuration", configuration(first.config)),
    ]
    path = out or folders[0] / "report.html"
    runs.write_bytes(path, _page(records, chapters, styles, points).encode())
    return path


def _page(records: list[Record], chapters: Chapters, styles: str, points: list[dict[str, Any]]) -> str:
    first = records[0]
    title = escape(first.name if len(records) == 1 else f"{len(records)} runs")
    versions = first.environment.get("versions", {})
    facts = [
        first.config.recipe,
        f"{max((line['step'] for line in first.metrics), default=0)} steps",
        f"seed {first.config.train.seed}",
        str(first.environment.get("started", "")),
        *(f"{package} {versions[package]}" for package in ("fastgessl", "torch") if package in versions),
    ]
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in chapters)
    body = "".join(
        f'<section id="{key}"><h2>{escape(heading)}</h2>{html}</section>' for key, heading, html in chapters
    )
    style, script = (
        (resources.files("fastgessl.report") / f"page.{kind}").read_text() for kind in ("css", "js")
    )
    # JSON that no HTML parser reads as anything else.
    data = json.dumps(points).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- Nothing may be fetched, whatever a file's name or a label holds. -->
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>{style}{styles}</style></head><body>
<h1>{title}</h1><p class="lead">{escape(" · ".join(filter(None, facts)))}</p><nav>{links}</nav>{body}
<div id="tip"><span class="picture thumb"></span><b></b><span></span></div>
<script type="application/json" id="points">{data}</script>
<script>{script}</script></body></html>
"""


def _curves(kinds: list[Kind]) -> str:
    """A chart per quantity, a line per run; runs that differ by their seed alone share a color."""
    several = len(kinds) > 1 or len(kinds[0].by_seed) > 1
    named: dict[str, Record] = {}
    colors: dict[str, int] = {}
    legend = ""
    for number, kind in enumerate(kinds):
        for seed, record in kind.by_seed.items():
            name = f"{kind.name}, seed {seed}" if several else record.name
            named[name], colors[name] = record, number
        if several:
            legend += f'<li><span class="key c{number % 10}"></span>{escape(kind.name)}</li>'
    charts = "".join(
        line_chart(title, {name: record.series(key) for name, record in named.items()}, unit, colors)
        for key, title, unit in CURVES
    )
    found = f'<ul class="legend">{legend}</ul><div class="charts">{charts}</div>'
    if any(record.series("effective_rank")[0] for record in named.values()):
        return found
    return (
        f'{found}<p class="lead">Effective rank and k-NN along the way: train with '
        "<code>--evaluate.every_epochs 5</code>.</p>"
    )


def evaluation_tables(evaluation: dict[str, Any]) -> str:
    """What `fastgessl evaluate` printed, from evaluation.json."""
    if not evaluation:
        return '<p class="none">This run has not been trained to its end, and has not been measured.</p>'
    tables = "".join(table.html() for table in tables_of(evaluation))
    if "universality" in evaluation and "learning" in evaluation:
        return tables
    more = "<code>fastgessl evaluate RUN --tasks universality learning</code>"
    return f'{tables}<p class="none">Universality has not been measured in full: {more}</p>'


def configuration(config: Config) -> str:
    """Every option, a table per section; what differs from the default is marked."""
    parts = ""
    for section, values in config.model_dump(mode="json", exclude={"recipe"}).items():
        defaults = flat(getattr(Config(), section).model_dump(mode="json"))
        rows = ""
        for key, value in flat(values).items():
            mark = "" if value == defaults[key] else " class=changed"
            rows += f'<tr{mark}><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        parts += (
            f"<details><summary>{escape(section)}</summary><div class=scroll><table><tbody>{rows}</tbody>"
            "</table></div></details>"
        )
    return (
        f"<p>Recipe <b>{escape(config.recipe)}</b>. Marked values differ from the default.</p>"
        f'<div class="options">{parts}</div>'
    )
