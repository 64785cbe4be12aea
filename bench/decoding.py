"""Three ways for DALI to decode a photo for its views, in turns within one run: what `python -m
bench.pipelines` writes as `decoding`.

`whole, once` is what the engine does. `each crop` decodes every view's crop by itself, `all crops, once` the
smallest area that holds them. All three give the same bytes, which is checked. CPU milliseconds of one
thread, decode to flip, medians of the rounds; ratios to the first way are taken round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType

from bench.timing import ratio
from fastgessl.kernels.views.torch import ViewParameters
from fastgessl.pipelines import ViewSpec
from fastgessl.pipelines.decode import image_size
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engines.dali_graph import cropped, view_arguments
from fastgessl.pipelines.sources.images import EncodedImages

WHOLE, EACH, TOGETHER = "whole, once", "each crop", "all crops, once"
_PHOTOS = 64


@dataclass(frozen=True)
class Row:
    data: str
    views: str
    way: str
    cpu_ms_per_image: float
    against_whole: float


def rows(
    data: str, views: str, images: EncodedImages, specs: tuple[ViewSpec, ...], rounds: int
) -> Iterator[Row]:
    """Of `specs`, and of its first view alone; the photos are spread evenly over `images`."""
    numbers = np.unique(np.linspace(0, len(images) - 1, _PHOTOS).astype(np.int64))
    encoded = [images.read(int(number)) for number in numbers]
    height, width = np.array([image_size(content, "") for content in encoded]).T
    for name, chosen in ((views, specs), (f"{views}, first view", specs[:1])):
        drawn = Draws(chosen, 0)(numbers, height, width, 0)
        pipelines = {
            way: _ways(encoded, chosen, drawn, way, batch_size=len(encoded))
            for way in (WHOLE, EACH, TOGETHER)
        }
        made = {
            way: [np.asarray(view.as_tensor()) for view in _run(pipeline)]
            for way, pipeline in pipelines.items()
        }
        if different := [
            way for way, shown in made.items() if not all(map(np.array_equal, shown, made[WHOLE]))
        ]:
            raise RuntimeError(f"{data}, {name}: decoding {different[0]!r} shows other pixels than {WHOLE!r}")
        turns = [
            {way: _cpu_ms(pipeline.run) / len(encoded) for way, pipeline in pipelines.items()}
            for _ in range(rounds)
        ]
        for way in pipelines:
            taken, whole = ([turn[each] for turn in turns] for each in (way, WHOLE))
            yield Row(data, name, way, statistics.median(taken), ratio(taken, whole))


def _run(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline.run()


def _cpu_ms(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return (time.process_time() - before) * 1e3


@pipeline_def(num_threads=1, device_id=None, prefetch_queue_depth=1)
def _ways(
    encoded: list[NDArray[np.uint8]], specs: tuple[ViewSpec, ...], drawn: Sequence[ViewParameters], way: str
) -> Any:
    """Decode to flip of one batch, the same at every run."""
    arguments = [view_arguments(spec, parameters) for spec, parameters in zip(specs, drawn, strict=True)]
    corner = np.min([start for start, *_ in arguments], axis=0)
    extent = np.max([start + shape for start, shape, *_ in arguments], axis=0) - corner
    source = fn.external_source(source=lambda: encoded, dtype=DALIDataType.UINT8, ndim=1)
    if way == WHOLE:
        image: Any = fn.decoders.image(source, output_type=DALIImageType.RGB)
    elif way == TOGETHER:
        image = _decoded_part(source, _constant(corner), _constant(extent))
    views = []
    for spec, (start, shape, *rest) in zip(specs, arguments, strict=True):
        inner = [_constant(array) for array in rest]
        if way == EACH:
            area = _decoded_part(source, _constant(start), _constant(shape))
        else:
            area = fn.slice(
                image, _constant(start - corner if way == TOGETHER else start), _constant(shape), axes=[0, 1]
            )
        views.append(cropped(area, spec, *inner))
    return tuple(views)


def _constant(array: NDArray[Any]) -> Any:
    dtype = DALIDataType.INT32 if array.dtype == np.int32 else DALIDataType.FLOAT
    return fn.external_source(source=lambda: array, dtype=dtype, ndim=array.ndim - 1)


def _decoded_part(source: Any, start: Any, shape: Any) -> Any:
    return fn.decoders.image_slice(
        source,
        start,
        shape,
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        output_type=DALIImageType.RGB,
    )
