"""What is done about images that cannot be decoded: the run stops and names them, or others stand in and they
are listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.images import Images

Read = TypeVar("Read")


@dataclass(frozen=True)
class Obtained(Generic[Read]):
    """A batch of b images after the bad ones were replaced or left out."""

    asked: NDArray[np.int64]
    """(b,) images that were asked for: what is drawn for a stand-in is drawn for these."""
    images: NDArray[np.int64]
    """(b,) images that are shown."""
    contents: list[Read]


class BadFiles:
    """The images of a loader that were found to be bad, and what is shown in their place.

    In training the next image that can be read stands in, with its own label, so that a batch stays whole; in
    evaluation a bad image is left out. Both depend on the images alone, so that every engine, rank and
    resumed run shows the same.
    """

    def __init__(self, images: Images, *, skip: bool, training: bool, listing: Path | None) -> None:
        self.found: dict[int, str] = {}
        """Number of a bad image: what is wrong with it."""
        self._images, self._skip, self._training, self._listing = images, skip, training, listing
        self._announced: set[int] = set()

    def obtain(self, asked: NDArray[np.int64], read: Callable[[int], Read]) -> Obtained[Read]:
        """What is shown for the images `asked` for, (B,) int64, with what `read` makes of each; raises as
        `obtain_one`.
        """
        found = [self.obtain_one(int(image), read) for image in asked]
        kept = [place for place, one in enumerate(found) if one is not None]
        shown = [one for one in found if one is not None]
        return Obtained(
            asked[kept],
            np.array([image for image, _ in shown], dtype=np.int64),
            [content for _, content in shown],
        )

    def obtain_one(self, image: int, read: Callable[[int], Read]) -> tuple[int, Read] | None:
        """The image that is shown for `image`, and what `read` makes of it; None if it is left out.

        Raises DataError for a bad image that is not to be skipped, or if no image can be read.
        """
        for candidate in range(image, image + len(self._images)):
            number = candidate % len(self._images)
            if number not in self.found:
                try:
                    return number, read(number)
                except DataError as error:
                    self.add(number, error)
            if not self._training:
                return None
        raise DataError(
            f"not one of the {len(self._images)} images can be read; the last one: {self.found[image]}"
        )

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
        new = [image for image in list(self.found) if image not in self._announced]
        if not new:
            return
        if not self._announced:
            listed = f" All bad files are listed in {self._listing}." if self._listing else ""
            warnings.warn(f"data.bad_files skip: {self.found[new[0]]}{listed}", stacklevel=2)
        self._announced.update(new)
        if self._listing is not None:
            self._append([self._images.name(image) for image in new], self._listing)

    def _append(self, names: Sequence[str], listing: Path) -> None:
        """Other ranks and loaders write to the same listing."""
        listed = (
            set(listing.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
            if listing.exists()
            else set()
        )
        with listing.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write("".join(f"{name}\n" for name in names if name not in listed))
