"""The features in two dimensions: PCA, t-SNE, and UMAP where it is installed."""

from __future__ import annotations

import importlib.util
from html import escape

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

# Exact layouts of more points are drowned in ink, and t-SNE of 1,000 takes some seconds.
POINTS = 1000
SIZE = 480
PERPLEXITY = 30.0


def layouts(features: Tensor, seed: int) -> dict[str, NDArray[np.float64]]:
    """Name of a method -> coordinates (N, 2) of features (N, F), N >= 3, each axis in [0, 1].

    >>> import torch
    >>> sorted(layouts(torch.randn(20, 4), seed=0))[:2]
    ['PCA', 't-SNE']
    """
    wide = features.double().numpy()
    principal = PCA(n_components=min(50, *wide.shape), random_state=seed).fit_transform(wide)
    found = {"PCA": principal[:, :2] if principal.shape[1] > 1 else np.repeat(principal, 2, axis=1)}
    neighbours = min(PERPLEXITY, (len(wide) - 1) / 3)
    found["t-SNE"] = TSNE(perplexity=neighbours, init="random", random_state=seed).fit_transform(
        principal.astype(np.float32)
    )
    if importlib.util.find_spec("umap") is not None:
        import umap

        found["UMAP"] = umap.UMAP(random_state=seed).fit_transform(principal)
    return {name: _framed(points) for name, points in found.items()}


def _framed(points: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / np.where(high > low, high - low, 1.0)


def colour(group: int, classes: int) -> str:
    """The CSS of a group's colour: one of the page's ten where they are enough, else a place on the colour
    circle.
    """
    return f"--f:var(--c{group})" if classes <= 10 else f"--f:hsl({360 * group / classes:.0f} 62% 52%)"


def scatter(name: str, points: NDArray[np.float64], groups: NDArray[np.int64] | None, classes: int) -> str:
    """Coordinates (N, 2) as an SVG with a dot for each image, its number in `data-n`, coloured by its group
    (N,).
    """
    dots = []
    for number, (x, y) in enumerate(points):
        hue = "" if groups is None else f' style="{colour(int(groups[number]), classes)}"'
        dots.append(
            f'<circle cx="{10 + (SIZE - 20) * x:.1f}" cy="{10 + (SIZE - 20) * (1 - y):.1f}" r="3.5" '
            f'data-n="{number}"{hue}/>'
        )
    return f'<svg class="map" viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{escape(name)} of the features">{"".join(dots)}</svg>'
