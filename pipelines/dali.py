"""The DALI engine: read, decode, crop, resize and flip in one graph; colour by `colour_views` on its bytes.

The graph is told what was drawn, so that it shows the same views as the other engines. On a GPU the decoder is nvJPEG ("mixed") and
everything after it runs there: one word of difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from fastgessl.kernels.views import ViewParameters, colour_views
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engine import Request
from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.header import blame, image_size, read_encoded
from fastgessl.pipelines.images import ArrayImages, FileImages, Images

_INTERPOLATION = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}
_PREFETCH = 2
# What the graph is fed for each view: where the crop may read (start, shape), the crop within that (start, end), the flip.
_VIEW_DTYPES = (DALIDataType.INT32, DALIDataType.INT32, DALIDataType.FLOAT, DALIDataType.FLOAT, DALIDataType.INT32)


class DaliEngine:
    """One DALI pipeline a rank, fed by `requests`; built at the first epoch and kept while epochs run to their end."""

    def __init__(self, images: Images, draws: Draws, batch_size: int, device: torch.device, workers: int) -> None:
        self._images, self._draws, self._device = images, draws, device
        self._batch_size, self._workers = batch_size, workers
        self._sizes = np.zeros((len(images), 2), dtype=np.int64)
        self._requests: Iterator[Request] = iter(())
        self._in_flight: deque[tuple[Request, list[ViewParameters]]] = deque()
        self._pipeline: Any = None

    def views(self, requests: Iterator[Request]) -> Generator[list[Tensor]]:
        self._requests = requests
        self._in_flight.clear()
        pipeline, self._pipeline = self._pipeline or self._build(), None
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                break
            except RuntimeError as failure:
                raise self._explain(failure) from failure
            request, drawn = self._in_flight.popleft()
            self._check_shapes(request, outputs[-1])
            yield [self._colour(view, number, drawn[number]) for number, view in enumerate(outputs[:-1])]
        # Only a pipeline that has run dry is kept: one that was left in mid-epoch still holds images decoded ahead.
        pipeline.reset()
        self._pipeline = pipeline

    def close(self) -> None:
        self._pipeline = None

    def _build(self) -> Any:
        on_gpu = self._device.type == "cuda"
        pipeline = _graph(
            self._feed,
            self._draws.specs,
            isinstance(self._images, FileImages),
            "gpu" if on_gpu else "cpu",
            batch_size=self._batch_size,
            num_threads=self._workers,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        pipeline.build()
        return pipeline

    def _feed(self) -> tuple[Any, ...]:
        """The next batch for the graph: pixels or encoded bytes, then `_VIEW_DTYPES` for each view. StopIteration ends the epoch."""
        request = next(self._requests)
        pixels = [self._source(int(image)) for image in request.index]
        height, width = self._sizes[request.index].T
        drawn = self._draws(request.index, height, width, request.epoch)
        self._in_flight.append((request, drawn))
        return pixels, *(array for parameters in drawn for array in _graph_arguments(parameters))

    def _source(self, image: int) -> NDArray[np.uint8]:
        if isinstance(self._images, ArrayImages):
            self._sizes[image] = self._images.images.shape[1:3]
            return self._images.images[image]
        encoded = read_encoded(self._images.paths[image])
        if self._sizes[image, 0] == 0:
            self._sizes[image] = image_size(encoded, self._images.paths[image])
        return encoded

    def _check_shapes(self, request: Request, shapes: Any) -> None:
        """A crop drawn for another size than the decoder found would be wrong without a word."""
        decoded = np.asarray(shapes.as_tensor())[:, :2]
        for image, found, expected in zip(request.index, decoded, self._sizes[request.index], strict=True):
            if (found != expected).any():
                raise DataError(
                    f"image {str(self._paths([image])[0])!r} decodes to {found[0]} x {found[1]} pixels, but its header says "
                    f"{expected[0]} x {expected[1]}. Convert it, or remove it from the data set."
                )

    def _colour(self, view: Any, number: int, parameters: ViewParameters) -> Tensor:
        spec = self._draws.specs[number]
        return colour_views(
            torch.from_dlpack(view.as_tensor()),
            parameters,
            mean=spec.mean,
            std=spec.std,
            blur_kernel=spec.blur_kernel,
            solarize_threshold=spec.solarize_threshold,
        )

    def _explain(self, failure: RuntimeError) -> Exception:
        """DALI names no file, and fails batches ahead of the one that is being waited for."""
        return blame(self._paths([image for request, _ in self._in_flight for image in request.index]), failure)

    def _paths(self, numbers: list[int]) -> list[Path]:
        return [self._images.paths[number] for number in numbers] if isinstance(self._images, FileImages) else []


@pipeline_def
def _graph(feed: Any, specs: Any, encoded: bool, device: str) -> Any:
    """Feed -> one (B, S, S, 3) uint8 batch a view, and the shapes of the decoded images."""
    dtypes = [DALIDataType.UINT8, *_VIEW_DTYPES * len(specs)]
    dims = [1 if encoded else 3, *(1, 1, 1, 1, 0) * len(specs)]
    layouts = ["" if encoded else "HWC", *[""] * (len(dtypes) - 1)]
    source, *arguments = fn.external_source(source=feed, num_outputs=len(dtypes), batch=True, dtype=dtypes, ndim=dims, layout=layouts)
    if encoded:
        image = fn.decoders.image(source, device="mixed" if device == "gpu" else "cpu", output_type=DALIImageType.RGB)
    else:
        image = source.gpu() if device == "gpu" else source
    views = []
    for number, spec in enumerate(specs):
        start, shape, crop_start, crop_end, flip = arguments[5 * number : 5 * number + 5]
        area = fn.slice(image, start, shape, axes=[0, 1])
        view: Any = fn.resize(
            area,
            size=[spec.size, spec.size],
            roi_start=crop_start,
            roi_end=crop_end,
            interp_type=_INTERPOLATION[spec.interpolation],
            antialias=True,
        )
        views.append(fn.flip(view, horizontal=flip))
    return (*views, image.shape(dtype=DALIDataType.INT64))


def _graph_arguments(parameters: ViewParameters) -> tuple[NDArray[Any], ...]:
    """One view's `_VIEW_DTYPES`, (B, 2) or (B,) each; the crop is counted from the corner of its reach."""
    crop, reach = parameters.crop.numpy(), parameters.reach.numpy()
    start = crop[:, :2] - reach[:, :2]
    return (
        reach[:, :2].astype(np.int32),
        reach[:, 2:].astype(np.int32),
        start,
        start + crop[:, 2:],
        parameters.flip.numpy().astype(np.int32),
    )


def make_engine(images: Images, draws: Draws, *, batch_size: int, device: torch.device, workers: int) -> DaliEngine:
    """Batches of at most `batch_size` images, decoded by `workers` threads."""
    return DaliEngine(images, draws, batch_size, device, workers)
