"""The DALI engine: read, decode, crop, resize and flip in one graph, and its own colors for views that ask
for them; other colors by `color_views` on its bytes.

The graph is told what was drawn, sample by sample, so that it shows the same views as the other engines. On a
GPU the decoder is nvJPEG ("mixed") and everything after it runs there.
"""

import io
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from fastgessl.kernels.views.parameters import LUMA_WEIGHTS, NEUTRAL_FACTOR, ViewParameters
from fastgessl.kernels.views.torch import color_views
from fastgessl.pipelines.decode import decode, image_size
from fastgessl.pipelines.engines import Engine, Made, Request, Setup
from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import ArrayImages
from fastgessl.pipelines.views import ViewSpec

_PREFETCH = 2
_INTERPOLATION = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}
# Fed per view: where the crop may read (start, shape), the crop within that (start, end), the flip.
_PLACE = (
    (DALIDataType.INT32, 1),
    (DALIDataType.INT32, 1),
    (DALIDataType.FLOAT, 1),
    (DALIDataType.FLOAT, 1),
    (DALIDataType.INT32, 0),
)
# Fed besides for a view of DALI's colors: factors of brightness, contrast and saturation, hue shift in
# degrees.
_COLORS = ((DALIDataType.FLOAT, 0),) * 4


@dataclass(frozen=True)
class _Fed:
    """A batch on its way through the graph."""

    request: Request
    index: NDArray[np.int64]
    """The images in it, (B,)."""
    drawn: list[ViewParameters]


class DaliEngine(Engine):
    """Makes views by one DALI pipeline per stream of requests."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._images, self._bad_files = setup, setup.images, setup.bad_files
        self._specs = setup.draws.specs
        self._sizes = np.zeros((len(self._images), 2), dtype=np.int64)
        # Images that DALI cannot read but Pillow can: PNGs without their end, for instance; and those whose
        # header says another size than their picture has. The graph is fed Pillow's picture of them.
        self._by_pillow: set[int] = set()
        self._requests: Iterator[Request] = iter(())
        self._in_flight: deque[_Fed] = deque()

    def views(self, requests: Iterator[Request]) -> Generator[Made]:
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
            yield Made(list(map(self._color, views, self._specs, fed.drawn)), fed.index)
        yield from self._left_out()

    def _build(self) -> Any:
        device, on_gpu = self._setup.device, self._setup.device.type == "cuda"
        pipeline = _view_graph(
            self._feed,
            self._specs,
            not isinstance(self._images, ArrayImages),
            on_gpu,
            batch_size=self._setup.batch_size,
            num_threads=self._setup.workers,
            device_id=(device.index or 0) if on_gpu else None,
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
            drawn = self._setup.draws(obtained.asked, height, width, request.epoch)
            self._in_flight.append(_Fed(request, obtained.images, drawn))
            if obtained.contents:
                return obtained.contents, *chain.from_iterable(map(view_arguments, self._specs, drawn))

    def _left_out(self) -> Generator[Made]:
        """Batches of which no image was left did not go through the graph."""
        while self._in_flight and len(self._in_flight[0].index) == 0:
            yield Made([], self._in_flight.popleft().index)

    def _source(self, image: int) -> NDArray[np.uint8]:
        if isinstance(self._images, ArrayImages):
            self._sizes[image] = self._images.images.shape[1:3]
            return self._images.images[image]
        encoded, name = self._images.read(image), self._images.name(image)
        if image in self._by_pillow:
            picture = decode(encoded, name)
            self._sizes[image] = picture.height, picture.width
            bitmap = io.BytesIO()
            picture.save(bitmap, "BMP")
            return np.frombuffer(bitmap.getvalue(), dtype=np.uint8)
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

    def _color(self, view: Any, spec: ViewSpec, drawn: ViewParameters) -> Tensor:
        if spec.color == "yiq":
            never = torch.zeros(len(drawn), dtype=torch.bool)
            drawn = replace(drawn, jitter=never, grayscale=never)
        return color_views(torch.from_dlpack(view.as_tensor()), drawn, **spec.look)

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
        culprits = misstated or {image for image in images if not _decodes(self._images.read(image))}
        if not culprits:
            raise failure
        self._by_pillow |= culprits


@pipeline_def
def _view_graph(
    feed: Callable[[], tuple[Any, ...]], specs: tuple[ViewSpec, ...], encoded: bool, on_gpu: bool
) -> Any:
    """`feed` gives encoded bytes or (H, W, 3) pixels, then `view_arguments` of each view.

    Returns one (B, S, S, 3) uint8 batch per view, and the shapes of the decoded images. An image is decoded
    once, as a whole. Decoding each view's crop by itself is bit-identical and takes 1.1 times the CPU time at
    2 views of large photos, 1.5 times at 2 + 6; for a single view it would take 0.8 times, and one decoding
    of all the views' crops together 0.97 times at 2 views (measured once, on a CPU), but then neither a wrong
    size in a header nor a file that ends below the crop would be noticed.
    """
    kinds = [(DALIDataType.UINT8, 1 if encoded else 3)]
    for spec in specs:
        kinds += [*_PLACE, *(_COLORS if spec.color == "yiq" else ())]
    dtypes, dims = zip(*kinds, strict=True)
    source, *places = fn.external_source(
        source=feed,
        num_outputs=len(kinds),
        batch=True,
        dtype=list(dtypes),
        ndim=list(dims),
        layout=["" if encoded else "HWC", *[""] * (len(kinds) - 1)],
    )
    if encoded:
        decoder = "mixed" if on_gpu else "cpu"
        image = fn.decoders.image(source, device=decoder, output_type=DALIImageType.RGB)
    else:
        image = source.gpu() if on_gpu else source
    arguments = iter(places)
    views = []
    for spec in specs:
        start, shape, *place = islice(arguments, len(_PLACE))
        view = cropped(fn.slice(image, start, shape, axes=[0, 1]), spec, *place)
        views.append(_yiq(view, *islice(arguments, len(_COLORS))) if spec.color == "yiq" else view)
    return (*views, image.shape(dtype=DALIDataType.INT64))


def cropped(area: Any, spec: ViewSpec, crop_start: Any, crop_end: Any, flip: Any) -> Any:
    """What of a picture interpolation may read -> (S, S, 3) uint8."""
    resized: Any = fn.resize(
        area,
        size=[spec.size, spec.size],
        roi_start=crop_start,
        roi_end=crop_end,
        interp_type=_INTERPOLATION[spec.interpolation],
        antialias=True,
    )
    return fn.flip(resized, horizontal=flip)


def _yiq(view: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any) -> Any:
    """Hue and saturation as one matrix product in YIQ, brightness and contrast as one affine map; clipped
    once, at the end.

    Contrast is about the image's own mean luma, as in torchvision: about DALI's 128 it is off by 9 to 27 grey
    levels.
    """
    mean = fn.reductions.mean(view, axes=[0, 1], dtype=DALIDataType.FLOAT)
    weighted = mean * np.array(LUMA_WEIGHTS, dtype=np.float32)
    luma = fn.reductions.sum(weighted, axes=[0], dtype=DALIDataType.FLOAT)
    # Per-sample arguments are read on the CPU.
    center = luma.cpu() if luma.device == "gpu" else luma
    turned = fn.hsv(view, hue=hue, saturation=saturation, dtype=DALIDataType.FLOAT)
    return fn.brightness_contrast(
        turned, brightness=brightness, contrast=contrast, contrast_center=center, dtype=DALIDataType.UINT8
    )


def view_arguments(spec: ViewSpec, drawn: ViewParameters) -> tuple[NDArray[Any], ...]:
    """What the graph is fed for one view, (B, 2) or (B,) each. The crop starts at the corner of its reach."""
    crop, reach = drawn.crop.numpy(), drawn.reach.numpy()
    corner, shape = reach[:, :2].astype(np.int32), reach[:, 2:].astype(np.int32)
    start = crop[:, :2] - reach[:, :2]
    place = (corner, shape, start, start + crop[:, 2:], drawn.flip.numpy().astype(np.int32))
    if spec.color != "yiq":
        return place
    # Neutral where no jitter was drawn; a sample without color has no saturation.
    neutral = np.array(NEUTRAL_FACTOR, dtype=np.float32)
    factors = np.where(drawn.jitter.numpy()[:, None], drawn.factors.numpy(), neutral)
    brightness, contrast, saturation, turns = np.ascontiguousarray(factors.T)
    saturation = np.where(drawn.grayscale.numpy(), np.float32(0), saturation)
    return *place, brightness, contrast, saturation, 360 * turns


def _decodes(encoded: NDArray[np.uint8]) -> bool:
    """Whether DALI can decode these bytes."""
    pipeline = _decoder(encoded, batch_size=1, num_threads=1, device_id=None)
    try:
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True


@pipeline_def
def _decoder(encoded: NDArray[np.uint8]) -> Any:
    source = fn.external_source(source=lambda: encoded, batch=False, dtype=DALIDataType.UINT8, ndim=1)
    return fn.decoders.image(source, device="cpu", output_type=DALIImageType.RGB)
