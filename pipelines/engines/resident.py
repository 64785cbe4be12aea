"""The resident engine: the whole data set as bytes on the training device, views made there in batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgessl.kernels.collectives import to_device
from fastgessl.kernels.views.torch import augment_views
from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engines.protocol import Request, Shown
from fastgessl.pipelines.sources.images import ArrayImages


class ResidentEngine:
    """Holds (N, H, W, 3) bytes; a batch is a gather and a call of `augment_views` for each view."""

    def __init__(self, images: ArrayImages, draws: Draws, device: torch.device) -> None:
        self._images = torch.from_numpy(images.images).to(device)
        self._draws = draws

    def views(self, requests: Iterator[Request]) -> Generator[Shown]:
        height, width = self._images.shape[1:3]
        for request in requests:
            images = self._gather(request.index)
            sizes = np.full(len(images), height), np.full(len(images), width)
            drawn = self._draws(request.index, *sizes, request.epoch)
            views = [
                augment_views(
                    images,
                    parameters,
                    size=spec.size,
                    mean=spec.mean,
                    std=spec.std,
                    interpolation=spec.interpolation,
                    blur_kernel=spec.blur_kernel,
                    solarize_threshold=spec.solarize_threshold,
                )
                for spec, parameters in zip(self._draws.specs, drawn, strict=True)
            ]
            yield Shown(views, request.index)

    def _gather(self, index: NDArray[np.int64]) -> Tensor:
        if self._images.device.type == "cpu":
            # On one thread: torch's gather wakes a second one, which costs up to 16 ms on a busy two-core
            # machine for 3 µs of work.
            return torch.from_numpy(self._images.numpy()[index])
        return self._images.index_select(0, to_device(torch.from_numpy(index.copy()), self._images.device))

    def close(self) -> None:
        self._images = self._images[:0]


def make_engine(
    images: ArrayImages,
    draws: Draws,
    bad_files: BadFiles,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> ResidentEngine:
    """`bad_files`, `batch_size` and `workers` play no part: there is nothing to decode."""
    return ResidentEngine(images, draws, device)
