"""Which images a rank sees at an iteration: a pure function, so that a run resumes exactly, on any number of
ranks.

A global batch is a run of `batch_size` consecutive places in the epoch's order; rank r takes the r-th of its
`world_size` equal parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.philox import key_of, philox

# Counter word that keeps the order's random numbers apart from those of the views, which use small stream
# numbers.
_ORDER_STREAM = 0xFFFFFFFF


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The images 0 .. size - 1 in the order of an epoch: (size,) int64, read-only.

    Sorted by 64 random bits each, drawn for (seed, epoch, image), so that the order does not hang on a
    library's shuffle.

    >>> sorted(epoch_order(5, seed=0, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    counter = np.zeros((size, 4), dtype=np.uint64)
    image = np.arange(size, dtype=np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = (
        image & np.uint64(0xFFFFFFFF),
        image >> np.uint64(32),
        _ORDER_STREAM,
    )
    words = philox(counter, key_of(seed, epoch))
    order = np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Sampling:
    """How a data set of `size` images is dealt out; raises DataError if it cannot be.

    Training: in the epoch's order, without the last partial global batch, so that no image comes twice.
    Evaluation: in the order of the data set; the last global batch is dealt out as evenly as it goes, and a
    rank may get one image fewer, or none.

    >>> ranks = [Sampling(10, 4, seed=0, rank=rank, world_size=2, training=False) for rank in (0, 1)]
    >>> [sampling.indices(epoch=0, iteration=2).tolist() for sampling in ranks]
    [[8], [9]]
    """

    size: int
    batch_size: int
    """Images of a global batch, over all ranks."""
    seed: int
    rank: int
    world_size: int
    training: bool

    def __post_init__(self) -> None:
        if self.size == 0:
            raise DataError("the data set holds no images. Add images, or name another data set.")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise DataError(
                f"rank must be from 0 to world_size - 1, found rank {self.rank} of {self.world_size}."
            )
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise DataError(
                f"batch size {self.batch_size} is no positive multiple of the {self.world_size} processes. "
                "Choose a multiple."
            )
        if self.training and self.batch_size > self.size:
            raise DataError(
                f"batch size {self.batch_size} is larger than the data set of {self.size} images. Choose at "
                f"most {self.size}."
            )

    @property
    def batches(self) -> int:
        """Global batches of an epoch: whole ones in training; in evaluation also the last, partial one."""
        return self.size // self.batch_size if self.training else -(-self.size // self.batch_size)

    def indices(self, epoch: int, iteration: int) -> NDArray[np.int64]:
        """This rank's images of global batch `iteration` of `epoch`: (batch_size / world_size,) int64, fewer
        in a partial batch.
        """
        start = iteration * self.batch_size
        count = min(self.batch_size, self.size - start)
        here = range(
            start + count * self.rank // self.world_size, start + count * (self.rank + 1) // self.world_size
        )
        return (
            epoch_order(self.size, self.seed, epoch)[here.start : here.stop]
            if self.training
            else np.arange(here.start, here.stop)
        )
