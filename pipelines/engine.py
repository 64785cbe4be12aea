"""What an engine is: it makes the views of the images it is asked for. Engines differ in where and how, never in what was drawn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One batch that is asked for: the images `index`, (B,) int64, as drawn in `epoch`."""

    index: NDArray[np.int64]
    epoch: int


class Engine(Protocol):
    """Each engine's module has `make_engine(images, draws, *, batch_size, device, workers) -> Engine`."""

    def views(self, requests: Iterator[Request]) -> Generator[list[Tensor]]:
        """The views of each request, in order: V tensors (B, 3, S, S) float32, channels_last, on the device. May read ahead."""

    def close(self) -> None:
        """Let go of threads, processes and device memory."""
