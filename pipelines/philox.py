"""Random numbers that are a pure function of what they are for: no generator, no state, no order of calls.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: Philox4x32-10.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(counter: ArrayLike, key: tuple[int, int]) -> NDArray[np.uint64]:
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


def key_of(seed: int, epoch: int) -> tuple[int, int]:
    """Key of an epoch of a run, for non-negative integers of any size: 64 bits of a hash of both."""
    # The hash sees words of 32 bits, one after the other: beyond one word each, how many are the seed's must
    # stand behind them.
    length = () if max(seed, epoch) <= _LOW else (-(-seed.bit_length() // 32) or 1,)
    low, high = np.random.SeedSequence((seed, epoch, *length)).generate_state(2, np.uint32)
    return int(low), int(high)


def uniforms(
    index: NDArray[np.int64], stream: int, blocks: range, key: tuple[int, int]
) -> NDArray[np.float64]:
    """(B,) sample numbers -> (B, len(blocks), 4) numbers in (0, 1), the same for a sample whatever stands
    beside it in the batch.
    """
    counter = np.zeros((len(index), len(blocks), 4), dtype=np.uint64)
    sample = index.astype(np.uint64)[:, None]
    counter[..., 0], counter[..., 1] = sample & _LOW, sample >> _HIGH
    counter[..., 2], counter[..., 3] = (
        np.uint64(stream),
        np.arange(blocks.start, blocks.stop, dtype=np.uint64),
    )
    return (philox(counter, key).astype(np.float64) + 0.5) / 2.0**32
