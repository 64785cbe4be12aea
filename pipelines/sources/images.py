"""A data set as the engines see it: arrays in memory, or encoded images to decode, each in a file of its own
or in tar shards.
"""

import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgessl.pipelines.sources import DataError

# Fifty times ImageNet-21k's. A date or a serial number read as a label is above it.
_MOST_CLASSES = 1 << 20


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """N images of one size, in memory."""

    images: NDArray[np.uint8]
    """(N, H, W, 3)"""
    labels: NDArray[np.int64] | None = None
    """(N,), indices into `classes`; None without labels."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, image: int) -> str:
        """The image's number, for messages."""
        return str(image)


@dataclass(frozen=True, eq=False)
class FileImages:
    """N image files of any sizes, decoded when they are needed."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64] | None = None
    """(N,), indices into `classes`; None without labels."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, image: int) -> str:
        """Where image number `image` lies, for messages."""
        return str(self.paths[image])

    def read(self, image: int) -> NDArray[np.uint8]:
        """The bytes of a file: (n,) uint8. Raises DataError if it cannot be read, is empty or no file."""
        return _read(self.paths[image], 0, -1, self.name(image))


@dataclass(frozen=True, eq=False)
class ShardImages:
    """N encoded images inside tar files, read from their place there when they are needed."""

    shards: tuple[Path, ...]
    names: tuple[str, ...]
    """(N,) names within the shard."""
    shard: NDArray[np.int64]
    """(N,) numbers of the shards."""
    offset: NDArray[np.int64]
    """(N,) first byte within the shard."""
    length: NDArray[np.int64]
    """(N,) bytes."""
    labels: NDArray[np.int64] | None = None
    """(N,), indices into `classes`; None without labels."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, image: int) -> str:
        """Shard and name within it, for messages."""
        return f"{self.shards[self.shard[image]]}:{self.names[image]}"

    def read(self, image: int) -> NDArray[np.uint8]:
        """The bytes of an image: (n,) uint8. Raises DataError if they cannot be read or there are none."""
        return _read(
            self.shards[self.shard[image]], int(self.offset[image]), int(self.length[image]), self.name(image)
        )


EncodedImages = FileImages | ShardImages
Images = ArrayImages | FileImages | ShardImages


def numbered_classes(largest: int, place: str) -> tuple[str, ...]:
    """The names "0", "1", … of classes whose largest number is `largest`. Raises DataError, naming the
    `place`, if it is not the number of a class.

    >>> numbered_classes(2, "the list")
    ('0', '1', '2')
    """
    if largest >= _MOST_CLASSES:
        raise DataError(
            f"{place} holds the label {largest}, and labels number the classes from 0. Number them closely."
        )
    return tuple(map(str, range(largest + 1)))


def _read(path: Path, offset: int, length: int, name: str) -> NDArray[np.uint8]:
    """`length` bytes from `offset` on; -1: all of them."""
    try:
        # A pipe would be waited for without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"image {name!r} is no regular file. Remove it from the data set.")
        with path.open("rb", buffering=0) as file:
            encoded = np.fromfile(file, dtype=np.uint8, count=length, offset=offset)
    except OSError as error:
        raise DataError(
            f"image {name!r} cannot be read ({error.strerror}). Remove it from the data set, or restore it."
        ) from error
    if len(encoded) == 0:
        raise DataError(f"image {name!r} is an empty file. Remove it from the data set, or restore it.")
    if len(encoded) < length:
        raise DataError(
            f"image {name!r} has {len(encoded)} of its {length} bytes: the shard was cut. Make it again."
        )
    return encoded
