"""What DALI runs: decode, crop, resize and flip, and its own colours for the views that ask for them.

A graph is told what was drawn, sample by sample. On a GPU the decoder is nvJPEG ("mixed") and everything
after it runs there: one word of difference.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from fastgessl.kernels.views.parameters import LUMA_WEIGHTS, NEUTRAL_FACTOR, ViewParameters
from fastgessl.pipelines.specs import ViewSpec

Fed = tuple[NDArray[Any], ...]

_INTERPOLATION = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}
# Fed for each view: where the crop may read (start, shape), the crop within that (start, end), the flip.
_PLACE = (
    (DALIDataType.INT32, 1),
    (DALIDataType.INT32, 1),
    (DALIDataType.FLOAT, 1),
    (DALIDataType.FLOAT, 1),
    (DALIDataType.INT32, 0),
)
# Fed besides for a view of DALI's colours: the factors of brightness, contrast and saturation, the hue shift
# in degrees.
_COLOURS = ((DALIDataType.FLOAT, 0),) * 4


@pipeline_def
def view_graph(
    feed: Callable[[], tuple[Any, ...]], specs: tuple[ViewSpec, ...], encoded: bool, device: str
) -> Any:
    """`feed` gives encoded bytes or (H, W, 3) pixels, then `view_arguments` of each view.

    Returns one (B, S, S, 3) uint8 batch a view, and the shapes of the decoded images. An image is decoded
    once, as a whole. Decoding each view's crop by itself is bit-identical and takes 1.1 times the CPU time at
    2 views of large photos, 1.5 times at 2 + 6; for a single view it would take 0.8 times, and one decoding
    of all the views' crops together 0.97 times at 2 views (`bench/decoding.py`), but then neither a wrong
    size in a header nor a file that ends below the crop would be noticed.
    """
    source, *places = _sources(feed, specs, encoded)
    if encoded:
        image = fn.decoders.image(
            source, device="mixed" if device == "gpu" else "cpu", output_type=DALIImageType.RGB
        )
    else:
        image = source.gpu() if device == "gpu" else source
    arguments = iter(places)
    views = []
    for spec in specs:
        start, shape, *place = islice(arguments, len(_PLACE))
        view = cropped(fn.slice(image, start, shape, axes=[0, 1]), spec, *place)
        views.append(_yiq(view, *islice(arguments, len(_COLOURS))) if spec.color == "yiq" else view)
    return (*views, image.shape(dtype=DALIDataType.INT64))


def _sources(feed: Callable[[], tuple[Any, ...]], specs: tuple[ViewSpec, ...], encoded: bool) -> list[Any]:
    kinds = [(DALIDataType.UINT8, 1 if encoded else 3)]
    for spec in specs:
        kinds += [*_PLACE, *(_COLOURS if spec.color == "yiq" else ())]
    dtypes, dims = zip(*kinds, strict=True)
    layouts = ["" if encoded else "HWC", *[""] * (len(kinds) - 1)]
    return [
        *fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            batch=True,
            dtype=list(dtypes),
            ndim=list(dims),
            layout=layouts,
        )
    ]


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
    luma = fn.reductions.sum(
        mean * np.array(LUMA_WEIGHTS, dtype=np.float32), axes=[0], dtype=DALIDataType.FLOAT
    )
    # Per-sample arguments are read on the CPU.
    centre = luma.cpu() if luma.device == "gpu" else luma
    turned = fn.hsv(view, hue=hue, saturation=saturation, dtype=DALIDataType.FLOAT)
    return fn.brightness_contrast(
        turned, brightness=brightness, contrast=contrast, contrast_center=centre, dtype=DALIDataType.UINT8
    )


def view_arguments(spec: ViewSpec, drawn: ViewParameters) -> Fed:
    """What `view_graph` is fed for one view: (B, 2), (B,) each. The crop is counted from the corner of its
    reach.
    """
    crop, reach = drawn.crop.numpy(), drawn.reach.numpy()
    start = crop[:, :2] - reach[:, :2]
    shape = reach[:, 2:].astype(np.int32)
    place = (
        reach[:, :2].astype(np.int32),
        shape,
        start,
        start + crop[:, 2:],
        drawn.flip.numpy().astype(np.int32),
    )
    return place + _colour_arguments(drawn) if spec.color == "yiq" else place


def _colour_arguments(drawn: ViewParameters) -> Fed:
    """Brightness, contrast, saturation, degrees of hue: neutral where no jitter was drawn; a sample without
    colour has no saturation.
    """
    factors = np.where(
        drawn.jitter.numpy()[:, None], drawn.factors.numpy(), np.array(NEUTRAL_FACTOR, dtype=np.float32)
    )
    brightness, contrast, saturation, turns = np.ascontiguousarray(factors.T)
    return brightness, contrast, np.where(drawn.grayscale.numpy(), np.float32(0), saturation), 360 * turns


def decodes(encoded: NDArray[np.uint8]) -> bool:
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
