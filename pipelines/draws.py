"""What chance decides about a view, as a pure function of (seed, epoch, image, view).

It does not hang on rank, world size, batch, threads or engine: two processes see the views that one process
sees, a resumed run sees those it would have seen, and two engines can be shown the same draw.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.pipelines.philox import key_of, uniforms
from fastgessl.pipelines.specs import ViewSpec

_CROP_ATTEMPTS = 10
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """The views of a run: `specs` holds one entry a view, repeats written out."""

    specs: tuple[ViewSpec, ...]
    seed: int

    def __call__(
        self, index: Integers, height: Integers, width: Integers, epoch: int
    ) -> list[ViewParameters]:
        """One `ViewParameters` of B rows for each view of the images `index`: (B,) int64 each."""
        return [
            draw_views(spec, index, height, width, seed=self.seed, epoch=epoch, view=view)
            for view, spec in enumerate(self.specs)
        ]


def draw_views(
    spec: ViewSpec, index: Integers, height: Integers, width: Integers, *, seed: int, epoch: int, view: int
) -> ViewParameters:
    """Draw view number `view` of the images `index`, whose sizes are `height` and `width`: (B,) int64 each.

    Distributions are torchvision's: RandomResizedCrop (ten attempts, then the largest central crop),
    RandomHorizontalFlip, RandomApply of ColorJitter, RandomGrayscale, RandomApply of GaussianBlur,
    RandomSolarize.

    >>> spec = ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> both = draw_views(spec, np.array([3, 7]), np.array([9, 9]), np.array([5, 5]), seed=0, epoch=0, view=0)
    >>> alone = draw_views(spec, np.array([7]), np.array([9]), np.array([5]), seed=0, epoch=0, view=0)
    >>> bool((both.crop[1] == alone.crop[0]).all())
    True
    """
    key = key_of(seed, epoch)
    chance, strength, further = uniforms(
        index, view, range(_CROP_ATTEMPTS, _CROP_ATTEMPTS + 3), key
    ).transpose(1, 0, 2)
    if spec.resize_short:
        crop, reach = _centre_crop(spec, height, width)
    else:
        crop = reach = _random_resized_crop(spec, index, height, width, view, key)
    low, high = spec.blur_sigma
    sigma = np.where(further[:, 1] < spec.blur_probability, low + (high - low) * further[:, 2], 0.0)
    return ViewParameters(
        crop=torch.from_numpy(crop.astype(np.float32)),
        reach=torch.from_numpy(reach.astype(np.float32)),
        flip=torch.from_numpy(chance[:, 0] < spec.flip_probability),
        jitter=torch.from_numpy(chance[:, 1] < spec.jitter_probability),
        factors=torch.from_numpy(_factors(spec, strength).astype(np.float32)),
        order=torch.from_numpy(_ORDERS[(further[:, 0] * len(_ORDERS)).astype(np.int64)]),
        grayscale=torch.from_numpy(chance[:, 2] < spec.grayscale_probability),
        blur_sigma=torch.from_numpy(sigma.astype(np.float32)),
        solarize=torch.from_numpy(chance[:, 3] < spec.solarize_probability),
    )


def _factors(spec: ViewSpec, uniform: Floats) -> Floats:
    """(B, 4) numbers in (0, 1) -> brightness, contrast and saturation factors, and the hue shift in turns."""
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    low = np.array([*(max(0.0, 1 - strength) for strength in strengths), -spec.hue])
    high = np.array([*(1 + strength for strength in strengths), spec.hue])
    return low + (high - low) * uniform


def _random_resized_crop(
    spec: ViewSpec, index: Integers, height: Integers, width: Integers, view: int, key: tuple[int, int]
) -> Floats:
    """(B, 4) top, left, height, width. An attempt is drawn again only for the images in which the one before
    did not fit.
    """
    crop = _largest_central_crop(spec, height, width)
    pending = np.arange(len(index))
    low_ratio, high_ratio = map(math.log, spec.crop_ratio)
    low_scale, high_scale = spec.crop_scale
    for attempt in range(_CROP_ATTEMPTS):
        drawn = uniforms(index[pending], view, range(attempt, attempt + 1), key)[:, 0]
        area = (height * width)[pending] * (low_scale + (high_scale - low_scale) * drawn[:, 0])
        ratio = np.exp(low_ratio + (high_ratio - low_ratio) * drawn[:, 1])
        tall, wide = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        fits = (tall >= 1) & (tall <= height[pending]) & (wide >= 1) & (wide <= width[pending])
        top = np.floor(drawn[:, 2] * (height[pending] - tall + 1))
        left = np.floor(drawn[:, 3] * (width[pending] - wide + 1))
        crop[pending[fits]] = np.stack([top, left, tall, wide], axis=1)[fits]
        pending = pending[~fits]
        if len(pending) == 0:
            break
    return crop


def _largest_central_crop(spec: ViewSpec, height: Integers, width: Integers) -> Floats:
    """Where no attempt fits: the whole image, or as much of it as the allowed ratios cover."""
    low, high = spec.crop_ratio
    tall = np.where(width / height < low, np.rint(width / low), height)
    wide = np.where(width / height > high, np.rint(height * high), width)
    return np.stack([(height - tall) // 2, (width - wide) // 2, tall, wide], axis=1).astype(np.float64)


def _centre_crop(spec: ViewSpec, height: Integers, width: Integers) -> tuple[Floats, Floats]:
    """Crop and reach of torchvision's Resize(resize_short) and CenterCrop(size), in pixels of the image
    before resizing.
    """
    short = np.minimum(height, width)
    new_height, new_width = spec.resize_short * height // short, spec.resize_short * width // short
    top, left = np.rint((new_height - spec.size) / 2), np.rint((new_width - spec.size) / 2)
    vertical, horizontal = height / new_height, width / new_width
    crop = np.stack([top * vertical, left * horizontal, spec.size * vertical, spec.size * horizontal], axis=1)
    return crop, np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1).astype(
        np.float64
    )
