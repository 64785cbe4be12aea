"""What decodes images and makes their views: one file per engine. Engines differ in where and how, never in
what was drawn.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.sources.images import Images


@dataclass(frozen=True)
class Setup:
    """What an engine works with."""

    images: Images
    draws: Draws
    bad_files: BadFiles
    batch_size: int
    """Images of this rank in a batch, at most."""
    device: torch.device
    workers: int
    """Threads (dali) or processes (torchvision) that decode."""


@dataclass(frozen=True)
class Request:
    """One batch that is asked for: the images `index`, (B,) int64, as drawn in `epoch`."""

    index: NDArray[np.int64]
    epoch: int


class Made(NamedTuple):
    """One batch as an engine made it. A tuple, because a DataLoader pins the memory of tuples only."""

    views: list[Tensor]
    """V tensors (B, 3, S, S) float32, channels_last, on the device; none if every image was left out."""
    index: NDArray[np.int64]  # type: ignore[assignment]
    """(B,) images shown: those asked for, but for bad ones, which are left out or replaced by another."""


class Engine:
    """Makes batches of views."""

    def views(self, requests: Iterator[Request]) -> Generator[Made]:
        """What each request gets, in order. May read ahead."""
        raise NotImplementedError

    def close(self) -> None:
        """Release threads, processes and device memory. By default nothing outlives a stream."""
