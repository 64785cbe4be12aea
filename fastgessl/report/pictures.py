"""Small pictures of images and views: one JPEG for many of them, shown piece by piece."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# 1,000 pictures of 32 pixels make a JPEG of about 600 kB.
SIDE = 32
COLUMNS = 32


@dataclass(frozen=True)
class Sheet:
    """N pictures of one size on a grid, as a data URI."""

    uri: str
    count: int
    columns: int

    def style(self, name: str) -> str:
        """A CSS class `name` whose background is the sheet."""
        rows = math.ceil(self.count / self.columns)
        return (
            f".{name}{{background-image:url({self.uri});background-size:{100 * self.columns}% {100 * rows}%}}"
        )

    def picture(self, name: str, number: int, caption: str = "", css: str = "") -> str:
        """An element that shows the number-th picture; `caption` is its description."""
        return f'<span class="picture {name} {css}" style="{self.place(number)}" role="img" aria-label="{escape(caption)}"></span>'

    def place(self, number: int) -> str:
        """The CSS that moves the sheet to the number-th picture."""
        rows = math.ceil(self.count / self.columns)
        across = 100 * (number % self.columns) / max(self.columns - 1, 1)
        down = 100 * (number // self.columns) / max(rows - 1, 1)
        return f"background-position:{across:.3f}% {down:.3f}%"


def sheet(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Sheet:
    """Normalised views (N, 3, S, S) -> their pictures, 32 pixels wide, JPEG.

    >>> sheet(torch.zeros(3, 3, 8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).count
    3
    """
    pixels = views.float() * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
    # Small images are enlarged without smoothing: their pixels are what the encoder sees.
    mode = "area" if views.shape[-1] >= SIDE else "nearest"
    small = (
        F.interpolate(pixels, (SIDE, SIDE), mode=mode)
        .clamp(0, 1)
        .mul(255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
    )
    columns = min(COLUMNS, len(small))
    rows = math.ceil(len(small) / columns)
    canvas = np.zeros((rows * columns, SIDE, SIDE, 3), dtype=np.uint8)
    canvas[: len(small)] = small
    grid = (
        canvas.reshape(rows, columns, SIDE, SIDE, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * SIDE, columns * SIDE, 3)
    )
    packed = io.BytesIO()
    Image.fromarray(grid).save(packed, "JPEG", quality=85)
    return Sheet(
        f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}", len(small), columns
    )
