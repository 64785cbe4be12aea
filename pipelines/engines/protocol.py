"""What an engine is: it makes the views of the images it is asked for. Engines differ in where and how, never
in what was drawn.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One batch that is asked for: the images `index`, (B,) int64, as drawn in `epoch`."""

    index: NDArray[np.int64]
    epoch: int


class Shown(NamedTuple):
    """One batch as an engine made it."""

    views: list[Tensor]
    """V tensors (B, 3, S, S) float32, channels_last, on the device; none if every image was left out."""
    images: NDArray[np.int64]
    """(B,): those asked for, but for bad ones, which are left out or have another in their place."""


class Engine(Protocol):
    """Each engine's module has `make_engine(images, draws, bad_files, *, batch_size, device, workers) ->
    Engine`.
    """

    def views(self, requests: Iterator[Request]) -> Generator[Shown]:
        """What each request gets, in order. May read ahead."""

    def close(self) -> None:
        """Let go of threads, processes and device memory."""
