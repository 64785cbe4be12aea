"""What there is to look at of one run: its views, maps of its features, nearest neighbors, and which classes
are taken for which.
"""

import base64
import importlib.util
import io
import math
from contextlib import closing
from html import escape
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import minmax_scale
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from fastgessl.config import ViewsConfig
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.sources import Source, subset, unusable_labels
from fastgessl.evaluate.subject import Subject
from fastgessl.evaluate.tables import Table
from fastgessl.evaluate.tasks.linear import fit_probe

VIEW_IMAGES = 12
MOST_VIEWS = 8
QUERIES, NEIGHBORS = 8, 7
MOST_CLASSES = 20
MOST_CONFUSIONS = 15
# More points are drowned in ink, and t-SNE of 1,000 takes some seconds.
POINTS = 1000
MAP_SIZE = 480
PERPLEXITY = 30.0
# 1,000 pictures of 32 pixels make a JPEG of about 600 kB.
PICTURE_SIDE = 32
PICTURE_COLUMNS = 32


class Gallery:
    """Pictures and features of one run, extracted once."""

    def __init__(self, subject: Subject, source: Source, accelerator: Accelerator) -> None:
        self._config = config = subject.config
        self._source = source
        self._extractor = Extractor(config, accelerator, subject.cache)
        encoder = subject.encoder.to(accelerator.device).to(memory_format=torch.channels_last)
        # The names and keys of `fastgessl evaluate`, whose features are then used.
        self._features = self._extractor.row(subject.name, encoder, source, with_views=False, whole_pool=True)
        self._shown = source.train if source.test is None else source.test
        self._seen = self._features.episodes
        self._seen.require_finite(f"Run '{subject.folder}'")
        order = torch.randperm(len(self._seen), generator=torch.Generator().manual_seed(config.train.seed))
        self._sample = self._seen.subset(order[:POINTS].sort().values)
        # A bad file has no row, so that rows are not numbers of images.
        images = subset(self._shown, self._sample.index.numpy())
        with closing(self._extractor.loader(images, [self._extractor.still], sharded=False)) as loader:
            pictures = torch.cat([batch.views[0].cpu() for batch in loader])
        self._thumbnails = Sheet("thumb", pictures, config.views)
        views = self._drawn_views()
        self._view_columns = views.shape[1]
        self._views = Sheet("view", views.flatten(0, 1), config.views)

    def styles(self) -> str:
        """CSS that holds the pictures."""
        return self._thumbnails.style() + self._views.style()

    def view_grid(self) -> str:
        """A row per image: itself, then the views that training makes of it."""
        columns, rows = self._view_columns, ""
        for start in range(0, self._views.count, columns):
            views = [self._views.picture(start + number, "view") for number in range(1, columns)]
            rows += f"<div>{self._views.picture(start, 'image')}{''.join(views)}</div>"
        return (
            f'<div class="views" style="--n:{columns}">{rows}</div>'
            "<p>Left the image, to its right the views of one epoch.</p>"
        )

    def embedding_map(self) -> str:
        """Every layout of the features, a dot per image; a pointer shows the picture and its label."""
        labels = self._sample.labels
        names = self._shown.classes
        few = len(self._sample) <= 3
        maps = {} if few else layouts(self._sample.features, self._config.train.seed)
        figures = [
            f'<figure class="chart"><figcaption>{name}</figcaption>'
            f"{scatter(name, points, labels, len(names))}</figure>"
            for name, points in maps.items()
        ]
        legend = [
            f'<li><span class="key dot" style="{color(number, len(names))}"></span>{escape(name)}</li>'
            for number, name in enumerate(names)
            if labels is not None and len(names) <= MOST_CLASSES
        ]
        about = (
            f"{len(self._sample)} of {len(self._seen)} {'training' if self._source.test is None else 'test'} "
            f"images, {'without labels' if labels is None else 'colors are classes'}. Point at or touch a "
            "dot to see its image."
        )
        return (
            f'<p>{about}</p><div class="charts maps">{"".join(figures)}</div>'
            f'<ul class="legend">{"".join(legend)}</ul>'
        )

    def points(self) -> list[dict[str, Any]]:
        """For each dot: its name, its label, and where its picture is on the sheet."""
        paths = getattr(self._shown, "paths", None)
        return [
            {
                "name": f"image {image}" if paths is None else paths[image].name,
                "label": self._label(number),
                "place": self._thumbnails.place(number),
            }
            for number, image in enumerate(self._sample.index.tolist())
        ]

    def neighbors(self) -> str:
        """A row per query: an image and its nearest neighbors among the others, by cosine."""
        points = self._sample.features
        search = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(points) - 1), metric="cosine").fit(points)
        nearest = search.kneighbors(return_distance=False)
        rows = ""
        for query in torch.linspace(0, len(points) - 1, min(QUERIES, len(points))).round().long().tolist():
            own = self._label(query)
            pictures = [self._thumbnails.picture(query, f"query {own}", "query")]
            for number in nearest[query]:
                label = self._label(number)
                pictures.append(self._thumbnails.picture(number, label, "" if label == own else "other"))
            rows += f"<div>{''.join(pictures)}<span>{escape(own)}</span></div>"
        frames = "" if self._sample.labels is None else " A red frame is another class."
        return (
            f"<p>Left the query, then its nearest neighbors by cosine.{frames}</p>"
            f'<div class="neighbors">{rows}</div>'
        )

    def confusion(self) -> str:
        """Which class a linear probe takes for which, on images that it has not seen."""
        if self._source.test is None:
            return '<p class="none">There is no test split to be confused on.</p>'
        train, test = self._features.train, self._features.test
        obstacle = unusable_labels(train.labels, test.labels)
        if obstacle:
            return f'<p class="none">Not measured: {escape(obstacle)}</p>'
        assert test.labels is not None
        probe = fit_probe(train, self._config.train.seed)
        counts = confusion_matrix(test.labels, probe.predict(test.features), labels=probe.classes)
        names = [self._class_name(label) for label in probe.classes.tolist()]
        drawn = heat_table(counts, names) if len(names) <= MOST_CLASSES else worst_pairs(counts, names).html()
        return (
            f"<p>A linear probe on all training labels, {100 * probe.accuracy(test):.1f} % right on "
            f"{len(test)} test images.</p>{drawn}"
        )

    def _drawn_views(self) -> Tensor:
        """A few images, each with its views as training draws them: (M, 1 + V, 3, S, S)."""
        images = self._source.train
        spread = np.linspace(0, len(images) - 1, min(VIEW_IMAGES, len(images))).round().astype(np.int64)
        chosen = subset(images, spread)
        still = self._extractor.loader(chosen, [self._extractor.still], sharded=False)
        drawn = self._extractor.training_views(chosen, len(chosen))
        views = [next(iter(still)).views[0], *next(iter(drawn)).views[:MOST_VIEWS]]
        size = self._config.views.size
        return torch.stack([F.interpolate(view.float().cpu(), (size, size)) for view in views], dim=1)

    def _label(self, number: int) -> str:
        """The class name of a point of the sample; empty without labels."""
        return "" if self._sample.labels is None else self._class_name(int(self._sample.labels[number]))

    def _class_name(self, label: int) -> str:
        return self._shown.classes[label] if label < len(self._shown.classes) else str(label)


class Sheet:
    """Small pictures of one size on a grid, one JPEG, shown piece by piece by the CSS class `name`.

    Made of normalized views (N, 3, S, S).

    >>> Sheet("thumb", torch.zeros(3, 3, 8, 8), ViewsConfig()).count
    3
    """

    def __init__(self, name: str, views: Tensor, config: ViewsConfig) -> None:
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
        # Small images are enlarged without smoothing: their pixels are what the encoder sees.
        mode = "area" if views.shape[-1] >= PICTURE_SIDE else "nearest"
        small = F.interpolate(views.float() * std + mean, (PICTURE_SIDE, PICTURE_SIDE), mode=mode)
        self.name, self.count = name, len(small)
        self.columns = min(PICTURE_COLUMNS, self.count)
        self.rows = math.ceil(self.count / self.columns)
        grid = make_grid(small.clamp(0, 1), nrow=self.columns, padding=0).mul(255).round().byte()
        self._jpeg = io.BytesIO()
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self._jpeg, "JPEG", quality=85)

    def style(self) -> str:
        """The CSS class."""
        uri = f"data:image/jpeg;base64,{base64.b64encode(self._jpeg.getvalue()).decode()}"
        size = f"{100 * self.columns}% {100 * self.rows}%"
        return f".{self.name}{{background-image:url({uri});background-size:{size}}}"

    def place(self, number: int) -> str:
        """The CSS position that shows the number-th picture."""
        down, across = divmod(number, self.columns)
        return f"{100 * across / max(self.columns - 1, 1):.3f}% {100 * down / max(self.rows - 1, 1):.3f}%"

    def picture(self, number: int, caption: str = "", css: str = "") -> str:
        """An element that shows the number-th picture; `caption` is its description."""
        return (
            f'<span class="picture {self.name} {css}" style="background-position:{self.place(number)}" '
            f'role="img" aria-label="{escape(caption)}"></span>'
        )


def layouts(features: Tensor, seed: int) -> dict[str, NDArray[np.float64]]:
    """Features (N, F), N >= 3, in two dimensions by PCA, t-SNE, and UMAP where it is installed: name of the
    method -> (N, 2), each axis in [0, 1].

    >>> sorted(layouts(torch.randn(20, 4), seed=0))[:2]
    ['PCA', 't-SNE']
    """
    wide = features.double().numpy()
    principal = PCA(n_components=min(50, *wide.shape), random_state=seed).fit_transform(wide)
    found = {"PCA": principal[:, [0, min(1, principal.shape[1] - 1)]]}
    tsne = TSNE(perplexity=min(PERPLEXITY, (len(wide) - 1) / 3), init="random", random_state=seed)
    found["t-SNE"] = tsne.fit_transform(principal.astype(np.float32))
    if importlib.util.find_spec("umap") is not None:
        import umap

        found["UMAP"] = umap.UMAP(random_state=seed).fit_transform(principal)
    return {name: minmax_scale(points) for name, points in found.items()}


def color(group: int, classes: int) -> str:
    """The CSS of a group's color: one of the page's ten where they are enough, else a place on the color
    circle.
    """
    return f"--f:var(--c{group})" if classes <= 10 else f"--f:hsl({360 * group / classes:.0f} 62% 52%)"


def scatter(name: str, points: NDArray[np.float64], labels: Tensor | None, classes: int) -> str:
    """Coordinates (N, 2) as an SVG with a dot for each image, its number in `data-n`, colored by its label
    (N,).
    """
    groups = [None] * len(points) if labels is None else labels.tolist()
    hues = ["" if group is None else f' style="{color(group, classes)}"' for group in groups]
    places = 10 + (MAP_SIZE - 20) * np.stack([points[:, 0], 1 - points[:, 1]], axis=1)
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" data-n="{number}"{hue}/>'
        for number, ((x, y), hue) in enumerate(zip(places, hues, strict=True))
    ]
    return (
        f'<svg class="map" viewBox="0 0 {MAP_SIZE} {MAP_SIZE}" role="img" '
        f'aria-label="{name} of the features">{"".join(dots)}</svg>'
    )


def heat_table(counts: NDArray[np.int64], names: list[str]) -> str:
    """The counts (C, C), true class by predicted class, as a table: darker for a larger share of its row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for name, row in zip(names, counts, strict=True):
        cells = "".join(f'<td style="--s:{count / max(sum(row), 1):.3f}">{count or ""}</td>' for count in row)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (
        '<p class="caption">Rows: what it is. Columns: what the probe says.</p><div class="scroll">'
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def worst_pairs(counts: NDArray[np.int64], names: list[str]) -> Table:
    """The most frequent confusions of many classes."""
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(wrong, axis=None)[::-1][:MOST_CONFUSIONS]
    rows = [
        [names[row], names[column], f"{wrong[row, column]} of {counts[row].sum()}"]
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
    title = f"The most frequent of {len(names)} x {len(names)} confusions"
    return Table(["it is", "taken for", "images"], rows, title)
