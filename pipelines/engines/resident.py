"""The resident engine: the whole data set as bytes on the training device, views made there in batch."""

from collections.abc import Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgessl.kernels.collectives import to_device
from fastgessl.kernels.views.torch import augment_views
from fastgessl.pipelines.engines import Engine, Made, Request, Setup
from fastgessl.pipelines.sources.images import ArrayImages


class ResidentEngine(Engine):
    """Holds (N, H, W, 3) bytes; a batch is a gather and a call of `augment_views` per view."""

    def __init__(self, setup: Setup) -> None:
        assert isinstance(setup.images, ArrayImages)  # `choose_engine` refuses others
        self._images = torch.from_numpy(setup.images.images).to(setup.device)
        self._draws = setup.draws

    def views(self, requests: Iterator[Request]) -> Generator[Made]:
        height, width = self._images.shape[1:3]
        for request in requests:
            images, count = self._gather(request.index), len(request.index)
            drawn = self._draws(request.index, np.full(count, height), np.full(count, width), request.epoch)
            views = [
                augment_views(images, row, size=spec.size, interpolation=spec.interpolation, **spec.look)
                for spec, row in zip(self._draws.specs, drawn, strict=True)
            ]
            yield Made(views, request.index)

    def _gather(self, index: NDArray[np.int64]) -> Tensor:
        if self._images.device.type == "cpu":
            # On one thread: torch's gather wakes a second one, which costs up to 16 ms on a busy two-core
            # machine for 3 µs of work.
            return torch.from_numpy(self._images.numpy()[index])
        return self._images.index_select(0, to_device(torch.from_numpy(index.copy()), self._images.device))

    def close(self) -> None:
        self._images = self._images[:0]
