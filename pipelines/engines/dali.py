"""The DALI engine: read, decode, crop, resize and flip in one graph (`dali_graph.py`); colour by
`color_views` on its bytes.

The graph is told what was drawn, so that it shows the same views as the other engines.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.kernels.views.torch import color_views
from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.decode import decode, image_size
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engines.dali_graph import decodes, view_arguments, view_graph
from fastgessl.pipelines.engines.protocol import Request, Shown
from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.images import ArrayImages, Images

_PREFETCH = 2


@dataclass(frozen=True)
class _Fed:
    """A batch on its way through the graph."""

    request: Request
    index: NDArray[np.int64]
    """The images in it, (B,)."""
    drawn: list[ViewParameters]


class DaliEngine:
    """One DALI pipeline for each stream of requests."""

    def __init__(
        self,
        images: Images,
        draws: Draws,
        bad_files: BadFiles,
        batch_size: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self._images, self._draws, self._bad_files, self._device = images, draws, bad_files, device
        self._batch_size, self._workers = batch_size, workers
        self._sizes = np.zeros((len(images), 2), dtype=np.int64)
        # Images that DALI cannot read but Pillow can: PNGs without their end, for instance; and those whose
        # header says another size than their picture has. The graph is fed Pillow's picture of them.
        self._by_pillow: set[int] = set()
        self._requests: Iterator[Request] = iter(())
        self._in_flight: deque[_Fed] = deque()

    def views(self, requests: Iterator[Request]) -> Generator[Shown]:
        self._requests = requests
        self._in_flight.clear()
        pipeline = self._build()
        while True:
            try:
                *views, shapes = pipeline.run()
            except StopIteration:
                break
            except RuntimeError as failure:
                self._find_culprit(failure)
                pipeline = self._restart()
                continue
            yield from self._left_out()
            fed = self._in_flight[0]
            if misread := self._misread(fed, shapes):
                self._by_pillow |= misread
                pipeline = self._restart()
                continue
            self._in_flight.popleft()
            yield Shown(
                [self._colour(view, number, fed.drawn[number]) for number, view in enumerate(views)],
                fed.index,
            )
        yield from self._left_out()

    def close(self) -> None:
        """Nothing outlives a stream."""

    def _build(self) -> Any:
        on_gpu = self._device.type == "cuda"
        pipeline = view_graph(
            self._feed,
            self._draws.specs,
            not isinstance(self._images, ArrayImages),
            "gpu" if on_gpu else "cpu",
            batch_size=self._batch_size,
            num_threads=self._workers,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        pipeline.build()
        return pipeline

    def _restart(self) -> Any:
        """A failure takes the whole pipeline with it: a new one begins with the batches that were on their
        way.
        """
        self._requests = chain([fed.request for fed in self._in_flight], self._requests)
        self._in_flight.clear()
        return self._build()

    def _feed(self) -> tuple[Any, ...]:
        """The next batch for the graph: pixels or encoded bytes, then `view_arguments` of each view.
        StopIteration ends the epoch.
        """
        while True:
            request = next(self._requests)
            obtained = self._bad_files.obtain(request.index, self._source)
            height, width = self._sizes[obtained.images].T
            drawn = self._draws(obtained.asked, height, width, request.epoch)
            self._in_flight.append(_Fed(request, obtained.images, drawn))
            if obtained.contents:
                fed = (
                    view_arguments(spec, parameters)
                    for spec, parameters in zip(self._draws.specs, drawn, strict=True)
                )
                return obtained.contents, *chain.from_iterable(fed)

    def _left_out(self) -> Generator[Shown]:
        """Batches of which no image was left did not go through the graph."""
        while self._in_flight and len(self._in_flight[0].index) == 0:
            yield Shown([], self._in_flight.popleft().index)

    def _source(self, image: int) -> NDArray[np.uint8]:
        if isinstance(self._images, ArrayImages):
            self._sizes[image] = self._images.images.shape[1:3]
            return self._images.images[image]
        encoded, name = self._images.read(image), self._images.name(image)
        if image in self._by_pillow:
            picture = decode(encoded, name)
            self._sizes[image] = picture.height, picture.width
            return _as_bitmap(picture)
        if self._sizes[image, 0] == 0:
            self._sizes[image] = image_size(encoded, name)
        return encoded

    def _misread(self, fed: _Fed, shapes: Any) -> set[int]:
        """Images that DALI decoded to another size than their header says: a crop drawn for the one would be
        wrong in the other.
        """
        decoded = np.asarray(shapes.as_tensor())[:, :2]
        misread = set(fed.index[(decoded != self._sizes[fed.index]).any(axis=1)].tolist())
        # A bitmap has the size of Pillow's picture; to ask for it again would never end.
        assert not misread & self._by_pillow
        return misread

    def _colour(self, view: Any, number: int, parameters: ViewParameters) -> Tensor:
        spec = self._draws.specs[number]
        if spec.color == "yiq":
            never = torch.zeros(len(parameters), dtype=torch.bool)
            parameters = replace(parameters, jitter=never, grayscale=never)
        return color_views(
            torch.from_dlpack(view.as_tensor()),
            parameters,
            mean=spec.mean,
            std=spec.std,
            blur_kernel=spec.blur_kernel,
            solarize_threshold=spec.solarize_threshold,
        )

    def _find_culprit(self, failure: RuntimeError) -> None:
        """DALI names no file, and fails batches ahead of the one that is waited for: look for it among all
        that are on their way.
        """
        if isinstance(self._images, ArrayImages):
            raise failure
        images = sorted({int(image) for fed in self._in_flight for image in fed.index} - self._by_pillow)
        known, misstated = len(self._bad_files.found), set()
        for image in images:
            try:
                picture = decode(self._images.read(image), self._images.name(image))
            except DataError as error:
                self._bad_files.add(image, error)
                continue
            if (picture.height, picture.width) != tuple(self._sizes[image]):
                misstated.add(image)
        if len(self._bad_files.found) > known:
            return
        # A crop that was drawn for the size in the header may lie outside the picture.
        culprits = misstated or {image for image in images if not decodes(self._images.read(image))}
        if not culprits:
            raise failure
        self._by_pillow |= culprits


def _as_bitmap(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture, encoded without loss as DALI can read it: (n,) uint8."""
    out = io.BytesIO()
    picture.save(out, "BMP")
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def make_engine(
    images: Images, draws: Draws, bad_files: BadFiles, *, batch_size: int, device: torch.device, workers: int
) -> DaliEngine:
    """Batches of at most `batch_size` images, decoded by `workers` threads."""
    return DaliEngine(images, draws, bad_files, batch_size, device, workers)
