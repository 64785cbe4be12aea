"""Makes tar shards or one .npz of a folder of photos; shards continue where an interrupted call stopped.

HEIC, TIFF and whatever else Pillow opens but DALI does not are converted on the way; what cannot be is named
in the report.
"""

import contextlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgessl.pipelines.decode import BROKEN, as_rgb, decode
from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.folder import CONVERTIBLE, EXTENSIONS, read_folder
from fastgessl.pipelines.sources.images import FileImages
from fastgessl.pipelines.sources.shards import CLASS_NAMES

_JPEG_QUALITY = 95
_LEFT_OUT = "left_out.txt"
Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass
class Prepared:
    """What became of the pictures, in this call and in those that it continues."""

    written: int = 0
    converted: list[str] = field(default_factory=list)
    """Pictures of formats that DALI does not read."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a picture: why it could not be used."""


def prepare_folder(
    folder: Path, out: Path, *, size: int, per_shard: int, track: Track = lambda work, _: work
) -> Prepared:
    """Write the images of `folder` (its splits and classes as `read_folder` finds them) to `out`.

    An `out` that ends in .npz gets arrays of `size` x `size` pixels (resized, then center-cropped; 0 asks
    that all pictures are of one size), and is written when all of them are made. Otherwise it is a folder of
    tar shards of `per_shard` images each, in which JPEG, PNG, WebP and BMP files lie unchanged; shards of an
    interrupted call are kept. `track` wraps the work of a split, to show progress. Raises DataError if there
    is nothing to read, or what is there was made from other pictures.
    """
    found = {split: read_folder(folder, split, (*EXTENSIONS, *CONVERTIBLE)) for split in ("train", "test")}
    splits = {split: images for split, images in found.items() if images is not None}
    if out.suffix == ".npz":
        return _write_npz(splits, out, size, track)
    shards = _Shards(out, per_shard, track)
    for split, images in splits.items():
        shards.write(images, "train" if split == "train" else "val")
    if splits["train"].labels is not None:
        _write_whole(out / CLASS_NAMES, splits["train"].classes)
    return shards.prepared


@dataclass(frozen=True)
class _Shards:
    """Writes tar shards under `out`; a later call keeps those that are whole."""

    out: Path
    per_shard: int
    track: Track
    prepared: Prepared = field(default_factory=Prepared)

    def write(self, images: FileImages, split: str) -> None:
        """Write every shard of a split."""
        self.out.mkdir(parents=True, exist_ok=True)
        # What the pictures are, and in which order, lies beside the work, so that a later call cannot
        # continue it with another folder.
        record = self.out / f"{split}.txt"
        content = (f"{self.per_shard} images a shard", *map(str, images.paths))
        if not record.exists():
            _write_whole(record, content)
        elif record.read_bytes() != _lines(content):
            raise DataError(
                f"{str(self.out)!r} holds work on other pictures, or with other options, of a call before. "
                "Remove it, or write elsewhere."
            )
        starts = range(0, len(images), self.per_shard)
        for start in self.track(starts, f"{split} images, by {self.per_shard}"):
            shard = self.out / f"{split}-{start // self.per_shard:06d}.tar"
            numbers = range(start, min(start + self.per_shard, len(images)))
            if not shard.exists():
                self._write_shard(shard, images, numbers)
            self._report(shard, images, numbers)

    def _write_shard(self, shard: Path, images: FileImages, numbers: range) -> None:
        # A shard gets its name when it is whole: what an interruption leaves is never taken for one.
        unfinished, reasons = shard.with_suffix(".tar.part"), []
        with tarfile.open(unfinished, "w") as archive:
            for image in numbers:
                try:
                    content, ending = _encoded(images, image)
                except DataError as error:
                    reasons.append(str(error))
                    continue
                sample = {ending: content}
                if images.labels is not None:
                    sample["cls"] = str(images.labels[image]).encode()
                for ending, content in sample.items():
                    member = tarfile.TarInfo(f"{image:09d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        listed = self._listed()
        with (self.out / _LEFT_OUT).open("ab") as file:
            file.write(_lines(reason for reason in reasons if reason not in listed))
        os.replace(unfinished, shard)

    def _listed(self) -> list[str]:
        """Why pictures were left out so far, a line each."""
        path = self.out / _LEFT_OUT
        text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
        return text.splitlines()

    def _report(self, shard: Path, images: FileImages, numbers: range) -> None:
        """Count what became of the pictures `numbers`, of which `shard` is whole."""
        try:
            with tarfile.open(shard) as archive:
                kept = {int(name.partition(".")[0]) for name in archive.getnames()}
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(
                f"shard {str(shard)!r} of a call before cannot be read ({error}). Remove it, and call again."
            ) from error
        self.prepared.written += len(kept)
        listed = self._listed()
        for image in numbers:
            name = images.name(image)
            if image not in kept:
                reasons = (reason for reason in listed if repr(name) in reason)
                self.prepared.left_out[name] = next(reasons, f"image {name!r} was left out before.")
            elif _ending(images, image) not in EXTENSIONS:
                self.prepared.converted.append(name)


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    """By renaming: an interruption leaves the whole file, or none."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(_lines(lines))
    os.replace(unfinished, path)


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _ending(images: FileImages, image: int) -> str:
    return images.paths[image].suffix[1:].lower()


def _encoded(images: FileImages, image: int) -> tuple[bytes, str]:
    """Bytes that every engine can decode, and the ending that belongs to them."""
    name, encoded, ending = images.name(image), images.read(image), _ending(images, image)
    if ending in EXTENSIONS:
        decode(encoded, name)
        return encoded.tobytes(), ending
    out = io.BytesIO()
    picture(encoded, name).save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue(), "jpg"


def picture(encoded: NDArray[np.uint8], name: str) -> Image.Image:
    """The upright RGB picture of any format that Pillow opens, with pillow-heif's help if that is installed.
    Raises DataError otherwise.
    """
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except (*BROKEN, RuntimeError, EOFError) as error:
        heif = Path(name).suffix.lower() in (".heic", ".heif")
        hint = " Install pillow-heif, and prepare into an empty place again." if heif else ""
        reason = "Pillow does not know its format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"image {name!r} cannot be converted ({reason}).{hint}") from error


def _write_npz(splits: dict[str, FileImages], out: Path, size: int, track: Track) -> Prepared:
    """By renaming: an interruption leaves no half file."""
    prepared = Prepared()
    arrays: dict[str, NDArray[Any]] = {}
    for split, images in splits.items():
        pixels, kept = np.empty((0, 0, 0, 3), dtype=np.uint8), list[int]()
        for image in track(range(len(images)), f"{split} images"):
            name = images.name(image)
            try:
                shown = picture(images.read(image), name)
            except DataError as error:
                prepared.left_out[name] = str(error)
                continue
            if size:
                shown = ImageOps.fit(shown, (size, size), Image.Resampling.BICUBIC)
            if not kept:
                pixels = np.empty((len(images), shown.height, shown.width, 3), dtype=np.uint8)
            if shown.size != (pixels.shape[2], pixels.shape[1]):
                first = f"{pixels.shape[2]}x{pixels.shape[1]}"
                raise DataError(
                    f"the pictures are of several sizes, such as {first} and {shown.width}x{shown.height} "
                    f"({name!r}). Give one with --size."
                )
            pixels[len(kept)] = np.asarray(shown)
            kept.append(image)
            if _ending(images, image) not in EXTENSIONS:
                prepared.converted.append(name)
        if not kept:
            last = [*prepared.left_out.values()][-1]
            raise DataError(f"not one of the {split} pictures can be read; the last one: {last}")
        arrays[f"{split}_x"] = pixels[: len(kept)]
        if images.labels is not None:
            arrays[f"{split}_y"] = images.labels[kept]
        prepared.written += len(kept)
    if splits["train"].labels is not None:
        arrays["classes"] = np.array(splits["train"].classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.part.npz")
    np.savez(unfinished, **arrays)  # type: ignore[arg-type]
    os.replace(unfinished, out)
    return prepared
