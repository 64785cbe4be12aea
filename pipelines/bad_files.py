"""Decides what is shown where an image cannot be decoded: the run stops and names it, or another replaces it
and it is listed.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import Images

Read = TypeVar("Read")


@dataclass(frozen=True)
class Obtained(Generic[Read]):
    """A batch of b images after the bad ones were replaced or left out."""

    asked: NDArray[np.int64]
    """(b,) images that were asked for: what is drawn for a replacement is drawn for these."""
    images: NDArray[np.int64]
    """(b,) images that are shown."""
    contents: list[Read]


class BadFiles:
    """The images of a loader that were found to be bad, and what is shown in their place.

    In training the next image that can be read replaces a bad one, with its own label, so that a batch stays
    whole; in evaluation a bad image is left out. Both depend on the images alone, so that every engine, rank
    and resumed run shows the same.
    """

    def __init__(self, images: Images, *, skip: bool, training: bool, listing: Path | None) -> None:
        self.found: dict[int, str] = {}
        """Number of a bad image: what is wrong with it."""
        self._images, self._skip, self._training, self._listing = images, skip, training, listing
        self._announced = 0

    def obtain(self, asked: NDArray[np.int64], read: Callable[[int], Read]) -> Obtained[Read]:
        """What is shown for the images `asked` for, (B,) int64, with what `read` makes of each.

        Raises DataError for a bad image that is not to be skipped, or if no image can be read.
        """
        found = [self._obtain_one(int(image), read) for image in asked]
        kept = [place for place, one in enumerate(found) if one is not None]
        shown = [one for one in found if one is not None]
        numbers = np.array([image for image, _ in shown], dtype=np.int64)
        return Obtained(asked[kept], numbers, [content for _, content in shown])

    def _obtain_one(self, image: int, read: Callable[[int], Read]) -> tuple[int, Read] | None:
        count = len(self._images)
        for candidate in range(image, image + (count if self._training else 1)):
            number = candidate % count
            if number not in self.found:
                try:
                    return number, read(number)
                except DataError as error:
                    self.add(number, error)
        if self._training:
            raise DataError(f"not one of the {count} images can be read; the last one: {self.found[image]}")
        return None

    def add(self, image: int, error: DataError) -> None:
        """Remember a bad image, or raise `error` if bad images are not to be skipped."""
        if not self._skip:
            raise error
        self.found[image] = str(error)

    def names(self) -> list[str]:
        """The bad images found so far, by name."""
        return [self._images.name(image) for image in sorted(self.found)]

    def announce(self) -> None:
        """Append the bad images that were found since the last call to the listing, and warn of the first."""
        new = list(self.found)[self._announced :]
        if not new:
            return
        if not self._announced:
            listed = f" All bad files are listed in {self._listing}." if self._listing else ""
            warnings.warn(f"data.bad_files skip: {self.found[new[0]]}{listed}", stacklevel=2)
        self._announced = len(self.found)
        if self._listing is not None:
            # Other ranks and loaders write to the same listing.
            with self._listing.open("a+", encoding="utf-8", errors="surrogateescape") as file:
                file.seek(0)
                listed_before = set(file.read().splitlines())
                names = [self._images.name(image) for image in new]
                file.writelines(f"{name}\n" for name in names if name not in listed_before)
