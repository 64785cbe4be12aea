"""`fastgessl prepare`: a data set fetched by name, or a folder of photos made into tar shards or one .npz, resumably.

HEIC, TIFF and whatever else Pillow opens but DALI does not are converted on the way; what cannot be is named in the report.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.folder import CONVERTIBLE, EXTENSIONS, read_folder
from fastgessl.pipelines.header import BROKEN, as_rgb, decode
from fastgessl.pipelines.images import FileImages
from fastgessl.pipelines.shards import CLASS_NAMES

_JPEG_QUALITY = 95
LEFT_OUT = "left_out.txt"
Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass
class Report:
    """What became of the pictures."""

    written: int = 0
    converted: list[str] = field(default_factory=list)
    """Pictures that were decoded and encoded anew, because DALI does not read their format."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a picture: why it could not be used."""


def prepare_folder(folder: Path, out: Path, *, size: int, per_shard: int, track: Track) -> Report:
    """Write the images of `folder` (its splits and classes as `read_folder` finds them) to `out`.

    An `out` that ends in .npz gets arrays of `size` x `size` pixels (resized, then centre-cropped; 0 asks that all pictures are of one
    size). Otherwise it is a folder of tar shards of `per_shard` images each, in which JPEG, PNG, WebP and BMP files lie unchanged. Shards
    that are there already are kept, so that an interrupted call goes on where it was. `track` wraps the work of a split, to show progress.
    Raises DataError if there is nothing to read, or `out` was made from other pictures.
    """
    report = Report()
    splits = {
        split: images for split in ("train", "test") if (images := read_folder(folder, split, (*EXTENSIONS, *CONVERTIBLE))) is not None
    }
    if out.suffix == ".npz":
        _write_npz(splits, out, size, track, report)
    else:
        out.mkdir(parents=True, exist_ok=True)
        if splits["train"].labels is not None:
            (out / CLASS_NAMES).write_text("".join(f"{name}\n" for name in splits["train"].classes), encoding="utf-8")
        for split, images in splits.items():
            _write_shards(images, out, "train" if split == "train" else "val", per_shard, track, report)
    return report


def _write_shards(images: FileImages, out: Path, split: str, per_shard: int, track: Track, report: Report) -> None:
    _check_same_source(images, out / f"{split}.txt", per_shard)
    named = set(report.left_out)
    for start in track(range(0, len(images), per_shard), f"{split} shards"):
        shard = out / f"{split}-{start // per_shard:06d}.tar"
        if shard.exists():
            continue
        # A shard gets its name when it is whole: what an interruption leaves is never taken for one.
        unfinished = shard.with_suffix(".tar.part")
        with tarfile.open(unfinished, "w") as archive:
            for image in range(start, min(start + per_shard, len(images))):
                _add_sample(archive, images, image, report)
        with (out / LEFT_OUT).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{reason}\n" for name, reason in report.left_out.items() if name not in named)
        named |= report.left_out.keys()
        os.replace(unfinished, shard)


def _check_same_source(images: FileImages, record: Path, per_shard: int) -> None:
    """The order of the pictures stands beside the shards, so that a later call cannot go on with another folder."""
    content = "".join(f"{name}\n" for name in (f"{per_shard} images a shard", *(images.name(image) for image in range(len(images)))))
    encoded = content.encode("utf-8", "surrogateescape")
    if record.exists() and record.read_bytes() != encoded:
        raise DataError(f"{str(record.parent)!r} has shards of other pictures, or of another size. Choose an empty folder.")
    record.write_bytes(encoded)


def _add_sample(archive: tarfile.TarFile, images: FileImages, image: int, report: Report) -> None:
    try:
        content, ending = _encoded(images, image, report)
    except DataError as error:
        report.left_out[images.name(image)] = str(error)
        return
    _add_member(archive, f"{image:09d}.{ending}", content)
    if images.labels is not None:
        _add_member(archive, f"{image:09d}.cls", str(images.labels[image]).encode())
    report.written += 1


def _add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _encoded(images: FileImages, image: int, report: Report) -> tuple[bytes, str]:
    """Bytes that every engine can decode, and the ending that goes with them."""
    name, encoded = images.name(image), images.read(image)
    ending = images.paths[image].suffix[1:].lower()
    if ending in EXTENSIONS:
        decode(encoded, name)
        return encoded.tobytes(), ending
    out = io.BytesIO()
    picture(encoded, name).save(out, "JPEG", quality=_JPEG_QUALITY)
    report.converted.append(name)
    return out.getvalue(), "jpg"


def picture(encoded: NDArray[np.uint8], name: str) -> Image.Image:
    """The upright RGB picture of any format that Pillow opens, with pillow-heif's help if that is installed. Raises DataError otherwise."""
    _register_heif()
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except (*BROKEN, RuntimeError, EOFError) as error:
        hint = " Install pillow-heif to convert it." if Path(name).suffix.lower() in (".heic", ".heif") else ""
        raise DataError(f"image {name!r} cannot be converted ({error}).{hint}") from error


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _write_npz(splits: dict[str, FileImages], out: Path, size: int, track: Track, report: Report) -> None:
    arrays: dict[str, Any] = {}
    for split, images in splits.items():
        pixels, kept = [], []
        for image in track(range(len(images)), f"{split} images"):
            try:
                pixels.append(_pixels(picture(images.read(image), images.name(image)), size, images.name(image)))
            except DataError as error:
                report.left_out[images.name(image)] = str(error)
                continue
            kept.append(image)
        shapes = sorted({array.shape[:2] for array in pixels})
        if len(shapes) != 1:
            raise DataError(f"the {split} pictures are of {len(shapes)} sizes, from {shapes[:1]} to {shapes[-1:]}. Give one with --size.")
        arrays[f"{split}_x"] = np.stack(pixels)
        if images.labels is not None:
            arrays[f"{split}_y"], arrays["classes"] = images.labels[kept], np.array(splits["train"].classes)
        report.written += len(kept)
    unfinished = out.with_suffix(".part.npz")
    np.savez(unfinished, **arrays)
    os.replace(unfinished, out)


def _pixels(image: Image.Image, size: int, name: str) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) if size else image)


def untracked(work: Iterable[int], _: str) -> Iterator[int]:
    """The `track` of a call that shows nothing."""
    yield from work
