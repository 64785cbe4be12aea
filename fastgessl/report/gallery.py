"""What there is to look at of one run: its views, the map of its features, nearest neighbours, and which
classes are taken for which.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from fastgessl.evaluate.cache import FeatureCache, subset
from fastgessl.evaluate.extraction import Extraction
from fastgessl.evaluate.features import Features
from fastgessl.evaluate.linear import fit_probe
from fastgessl.evaluate.splits import unusable_labels
from fastgessl.evaluate.subject import Subject
from fastgessl.pipelines.sources.images import Images
from fastgessl.report.maps import POINTS, colour, layouts, scatter
from fastgessl.report.pictures import Sheet, sheet
from fastgessl.report.tables import table

VIEW_IMAGES = 12
MOST_VIEWS = 8
QUERIES, NEIGHBOURS = 8, 7
MOST_CLASSES = 20


class Gallery:
    """Pictures and features of one run, extracted once."""

    def __init__(
        self, subject: Subject, images: Images, test: Images | None, accelerator: Accelerator
    ) -> None:
        config = subject.config
        cache = FeatureCache(subject.folder / "features" if config.evaluate.cache else None)
        self._extraction = Extraction(config, accelerator, cache)
        self._config, self._images, self._test = config, images, test
        self._shown = images if test is None else test
        encoder = subject.encoder.to(accelerator.device).to(memory_format=torch.channels_last)
        # The names and keys of `fastgessl evaluate`, whose features are then used.
        (self._train,) = self._extraction.features(
            subject.name, encoder, f"{config.data.name}-train", images, [self._extraction.still]
        )
        self._seen = self._train
        if test is not None:
            (self._seen,) = self._extraction.features(
                subject.name, encoder, f"{config.data.name}-test", test, [self._extraction.still]
            )
        self._seen.require_finite(f"Run '{subject.folder}'")
        count = len(self._seen)
        rows = (
            torch.randperm(count, generator=torch.Generator().manual_seed(config.train.seed))[:POINTS]
            .sort()
            .values
        )
        self._sample = self._seen.subset(rows)
        # A bad file has no row, so that rows are not numbers of images.
        self._thumbnails = self._pictures(subset(self._shown, self._sample.index.numpy()))

    def styles(self) -> str:
        """CSS that holds the thumbnails."""
        return self._thumbnails.style("thumb") + self._views()[0].style("view")

    def view_grid(self) -> str:
        """A row an image: itself, then the views that training makes of it."""
        pictures, columns = self._views()
        rows = [range(start, start + columns) for start in range(0, pictures.count, columns)]
        whole = [
            [pictures.picture("view", number, "view" if number % columns else "image") for number in row]
            for row in rows
        ]
        cells = "".join(f"<div>{''.join(row)}</div>" for row in whole)
        return f'<div class="views" style="--n:{columns}">{cells}</div><p>Left the image, to its right the views of one epoch.</p>'

    def embedding_map(self) -> str:
        """Every layout of the features, a dot an image; a pointer shows the picture and its label."""
        labels = None if self._sample.labels is None else self._sample.labels.numpy()
        maps = layouts(self._sample.features, self._config.train.seed) if len(self._sample) > 3 else {}
        dots = {
            name: scatter(name, points, labels, len(self._shown.classes)) for name, points in maps.items()
        }
        figures = "".join(
            f'<figure class="chart"><figcaption>{escape(name)}</figcaption>{each}</figure>'
            for name, each in dots.items()
        )
        what = "test" if self._test is not None else "training"
        colours = "colours are classes" if labels is not None else "without labels"
        about = f"{len(self._sample)} of {len(self._seen)} {what} images, {colours}. Point at or touch a dot to see its image."
        return f'<p>{about}</p><div class="charts maps">{figures}</div>{self._legend()}'

    def points(self) -> list[dict[str, Any]]:
        """For each dot: its name, its label, and where its picture lies on the sheet."""
        return [
            {
                "name": self._name(image),
                "label": self._label(number),
                "place": self._thumbnails.place(number).split(":")[1],
            }
            for number, image in enumerate(self._sample.index.tolist())
        ]

    def neighbours(self) -> str:
        """A row a query: an image and its nearest neighbours among the others, by cosine."""
        points = F.normalize(self._sample.features, dim=1)
        queries = torch.linspace(0, len(points) - 1, min(QUERIES, len(points))).round().long()
        similarity = points[queries] @ points.T
        similarity[torch.arange(len(queries)), queries] = -torch.inf
        nearest = similarity.topk(min(NEIGHBOURS, len(points) - 1), dim=1).indices
        rows = "".join(
            self._neighbour_row(int(query), found.tolist())
            for query, found in zip(queries, nearest, strict=True)
        )
        borders = " A red frame is another class." if self._sample.labels is not None else ""
        return f'<p>Left the query, then its nearest neighbours by cosine.{borders}</p><div class="neighbours">{rows}</div>'

    def _neighbour_row(self, query: int, found: list[int]) -> str:
        own = self._label(query)
        pieces = [self._thumbnails.picture("thumb", query, f"query {own}", "query")]
        for number in found:
            wrong = "other" if self._label(number) != own else ""
            pieces.append(self._thumbnails.picture("thumb", number, self._label(number), wrong))
        return f"<div>{''.join(pieces)}<span>{escape(own)}</span></div>"

    def confusion(self) -> str:
        """Which class a linear probe takes for which, on images that it has not seen."""
        if self._test is None:
            return '<p class="none">There is no test split to be confused on.</p>'
        obstacle = unusable_labels(self._train.labels, self._seen.labels)
        if obstacle:
            return f'<p class="none">Not measured: {escape(obstacle)}</p>'
        matrix, classes = confusion_matrix(self._train, self._seen, self._config.train.seed)
        names = [
            self._shown.classes[int(label)] if int(label) < len(self._shown.classes) else str(int(label))
            for label in classes
        ]
        accuracy = matrix.diagonal().sum() / matrix.sum()
        about = f"A linear probe on all training labels, {100 * accuracy:.1f} % right on {int(matrix.sum())} test images."
        return f"<p>{about}</p>" + (
            heat_table(matrix, names) if len(names) <= MOST_CLASSES else worst_pairs(matrix, names)
        )

    def _views(self) -> tuple[Sheet, int]:
        """The sheet of images and their views, and how many of these make a row."""
        if not hasattr(self, "_view_sheet"):
            spread = (
                np.linspace(0, len(self._images) - 1, min(VIEW_IMAGES, len(self._images)))
                .round()
                .astype(np.int64)
            )
            images = subset(self._images, spread)
            still = next(iter(self._extraction.loader(images, [self._extraction.still], sharded=False))).views
            drawn = next(iter(self._extraction.training_views(images, len(images)))).views[:MOST_VIEWS]
            size = self._config.views.size
            shown = [F.interpolate(view.float().cpu(), (size, size)) for view in [*still, *drawn]]
            stacked = torch.stack(shown, dim=1).flatten(0, 1)
            self._view_sheet = sheet(stacked, self._config.views.mean, self._config.views.std), len(shown)
        return self._view_sheet

    def _pictures(self, images: Images) -> Sheet:
        loader = self._extraction.loader(images, [self._extraction.still], sharded=False)
        views: list[Tensor] = [batch.views[0].cpu() for batch in loader]
        loader.close()
        return sheet(torch.cat(views), self._config.views.mean, self._config.views.std)

    def _name(self, image: int) -> str:
        paths = getattr(self._shown, "paths", None)
        return paths[image].name if paths is not None else f"image {image}"

    def _label(self, number: int) -> str:
        """The class name of a point of the sample; empty without labels."""
        if self._sample.labels is None:
            return ""
        label = int(self._sample.labels[number])
        return self._shown.classes[label] if label < len(self._shown.classes) else str(label)

    def _legend(self) -> str:
        classes = self._shown.classes
        if self._sample.labels is None or not 0 < len(classes) <= MOST_CLASSES:
            return ""
        keys = "".join(
            f'<li><span class="key dot" style="{colour(number, len(classes))}"></span>{escape(name)}</li>'
            for number, name in enumerate(classes)
        )
        return f'<ul class="legend">{keys}</ul>'


def confusion_matrix(train: Features, test: Features, seed: int) -> tuple[np.ndarray, Tensor]:
    """Counts (C, C), the row the true class and the column the predicted one, of a linear probe; and the
    labels (C,).
    """
    assert test.labels is not None
    probe = fit_probe(train, seed)
    predicted = probe.log_probabilities(test.features).argmax(dim=1)
    count = len(probe.classes)
    return (probe.columns(test.labels) * count + predicted).bincount(minlength=count * count).view(
        count, count
    ).numpy(), probe.classes


def heat_table(matrix: np.ndarray, names: list[str]) -> str:
    """The counts (C, C) as a table, darker the larger their share of the row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, counts in zip(names, matrix, strict=True):
        total = max(int(counts.sum()), 1)
        cells = "".join(f'<td style="--s:{count / total:.3f}">{count or ""}</td>' for count in counts)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body = "".join(rows)
    return (
        '<p class="caption">Rows: what it is. Columns: what the probe says.</p><div class="scroll"><table '
        'class="heat">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def worst_pairs(matrix: np.ndarray, names: list[str], count: int = 15) -> str:
    """The most frequent confusions of many classes."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None)[::-1][:count]
    rows = [
        [names[row], names[column], f"{wrong[row, column]} of {matrix[row].sum()}"]
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
    return table(
        ["it is", "taken for", "images"], rows, f"The most frequent of {len(names)} x {len(names)} confusions"
    )
