"""What chance decides, as a pure function of what it is for: an epoch's order of (seed, epoch, image), a
view's crop and colors of (seed, epoch, image, view).

No generator, no state, no order of calls. So nothing depends on rank, world size, batch, threads or engine:
two processes see the views that one process sees, a resumed run sees those it would have seen, and two
engines can be shown the same draw. The numbers come from Philox4x32-10: Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.pipelines.views import ViewSpec

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
# Keeps the order's random numbers apart from those of the views, which use small stream numbers.
_ORDER_STREAM = 0xFFFFFFFF
_CROP_ATTEMPTS = 10
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Key = tuple[int, int]


def philox(counter: ArrayLike, key: Key) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters (..., 4) of 32-bit words -> (..., 4) words of 32 random bits.

    >>> [f"{word:08x}" for word in philox([0, 0, 0, 0], (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    first, second, third, fourth = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    for turn in range(_ROUNDS):
        low_key, high_key = (
            np.uint64((part + turn * step) & 0xFFFFFFFF) for part, step in zip(key, _KEY_STEPS, strict=True)
        )
        left, right = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first, second, third, fourth = (
            (right >> _HIGH) ^ second ^ low_key,
            right & _LOW,
            (left >> _HIGH) ^ fourth ^ high_key,
            left & _LOW,
        )
    return np.stack([first, second, third, fourth], axis=-1)


def key_of(seed: int, epoch: int) -> Key:
    """Key of an epoch of a run, for non-negative integers of any size: 64 bits of a hash of both."""
    # The hash sees one row of 32-bit words. For larger values the seed's word count is appended, so that two
    # pairs of the same words do not collide.
    length = () if max(seed, epoch) <= _LOW else (-(-seed.bit_length() // 32) or 1,)
    low, high = np.random.SeedSequence((seed, epoch, *length)).generate_state(2, np.uint32)
    return int(low), int(high)


def _words(index: Integers, stream: int, blocks: range, key: Key) -> NDArray[np.uint64]:
    """(B,) sample numbers -> (B, len(blocks), 4) words of 32 random bits, the same for a sample whatever else
    is in the batch.
    """
    counter = np.zeros((len(index), len(blocks), 4), dtype=np.uint64)
    sample = index.astype(np.uint64)[:, None]
    counter[..., 0] = sample & _LOW
    counter[..., 1] = sample >> _HIGH
    counter[..., 2] = stream
    counter[..., 3] = blocks
    return philox(counter, key)


def uniforms(index: Integers, stream: int, blocks: range, key: Key) -> Floats:
    """(B,) sample numbers -> (B, len(blocks), 4) numbers in (0, 1), each a function of its sample, `stream`,
    block and `key` alone.
    """
    return (_words(index, stream, blocks, key).astype(np.float64) + 0.5) / 2.0**32


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> Integers:
    """The images 0 .. size - 1 in the order of an epoch: (size,) int64, read-only.

    Sorted by 64 random bits each, drawn for (seed, epoch, image), so that the order does not depend on a
    library's shuffle.

    >>> sorted(epoch_order(5, seed=0, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    words = _words(np.arange(size), _ORDER_STREAM, range(1), key_of(seed, epoch))[:, 0]
    order = np.argsort(words[:, 0] << _HIGH | words[:, 1], kind="stable")
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Draws:
    """Draws the views of a run: `specs` holds one entry per view, repeats written out.

    Distributions are torchvision's: RandomResizedCrop (ten attempts, then the largest central crop),
    RandomHorizontalFlip, RandomApply of ColorJitter, RandomGrayscale, RandomApply of GaussianBlur,
    RandomSolarize.

    >>> draws = Draws((ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),), seed=0)
    >>> (both,) = draws(np.array([3, 7]), np.array([9, 9]), np.array([5, 5]), epoch=0)
    >>> (alone,) = draws(np.array([7]), np.array([9]), np.array([5]), epoch=0)
    >>> bool((both.crop[1] == alone.crop[0]).all())
    True
    """

    specs: tuple[ViewSpec, ...]
    seed: int

    def __call__(
        self, index: Integers, height: Integers, width: Integers, epoch: int
    ) -> list[ViewParameters]:
        """One `ViewParameters` of B rows per view, for the images `index` of these sizes: (B,) int64 each."""
        key = key_of(self.seed, epoch)
        return [_draw(spec, index, height, width, view, key) for view, spec in enumerate(self.specs)]


def _draw(
    spec: ViewSpec, index: Integers, height: Integers, width: Integers, view: int, key: Key
) -> ViewParameters:
    blocks = range(_CROP_ATTEMPTS, _CROP_ATTEMPTS + 3)
    chance, strength, extra = uniforms(index, view, blocks, key).transpose(1, 0, 2)
    if spec.resize_short:
        crop, reach = _center_crop(spec, height, width)
    else:
        crop = reach = _random_resized_crop(spec, index, height, width, view, key)
    low, high = spec.blur_sigma
    sigma = np.where(extra[:, 1] < spec.blur_probability, low + (high - low) * extra[:, 2], 0.0)
    return ViewParameters(
        crop=torch.from_numpy(crop.astype(np.float32)),
        reach=torch.from_numpy(reach.astype(np.float32)),
        flip=torch.from_numpy(chance[:, 0] < spec.flip_probability),
        jitter=torch.from_numpy(chance[:, 1] < spec.jitter_probability),
        factors=torch.from_numpy(_factors(spec, strength).astype(np.float32)),
        order=torch.from_numpy(_ORDERS[(extra[:, 0] * len(_ORDERS)).astype(np.int64)]),
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
    spec: ViewSpec, index: Integers, height: Integers, width: Integers, view: int, key: Key
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


def _center_crop(spec: ViewSpec, height: Integers, width: Integers) -> tuple[Floats, Floats]:
    """Crop and reach of torchvision's Resize(resize_short) and CenterCrop(size), in pixels of the image
    before resizing.
    """
    short = np.minimum(height, width)
    new_height, new_width = spec.resize_short * height // short, spec.resize_short * width // short
    top, left = np.rint((new_height - spec.size) / 2), np.rint((new_width - spec.size) / 2)
    vertical, horizontal = height / new_height, width / new_width
    crop = np.stack([top * vertical, left * horizontal, spec.size * vertical, spec.size * horizontal], axis=1)
    whole = np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)
    return crop, whole.astype(np.float64)
