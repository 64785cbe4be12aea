"""A data set as the engines see it: arrays in memory, or files to decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """N images of one size, in memory."""

    images: NDArray[np.uint8]
    """(N, H, W, 3)"""
    labels: NDArray[np.int64] | None = None
    """(N,), indices into `classes`; None without labels."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class FileImages:
    """N image files of any sizes, decoded when they are needed."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64] | None = None
    """(N,), indices into `classes`; None without labels."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)


Images = ArrayImages | FileImages
