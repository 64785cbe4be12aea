"""`fastgessl prepare`: a data set fetched by name, or a folder of photos made into tar shards or one .npz,
resumably.

HEIC, TIFF and whatever else Pillow opens but DALI does not are converted on the way; what cannot be is named
in the report.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgessl.pipelines.decode import BROKEN, as_rgb, decode
from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.folder import CONVERTIBLE, EXTENSIONS, read_folder
from fastgessl.pipelines.sources.images import FileImages
from fastgessl.pipelines.sources.shards import CLASS_NAMES

_JPEG_QUALITY = 95
# Pictures that an interruption of the writing of an .npz may cost: some seconds of decoding.
_BLOCK = 256
LEFT_OUT = "left_out.txt"
Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass
class Report:
    """What became of the pictures, in this call and in those that it went on with."""

    written: int = 0
    converted: list[str] = field(default_factory=list)
    """Pictures that were decoded and encoded anew, because DALI does not read their format."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a picture: why it could not be used."""


def prepare_folder(folder: Path, out: Path, *, size: int, per_shard: int, track: Track) -> Report:
    """Write the images of `folder` (its splits and classes as `read_folder` finds them) to `out`.

    An `out` that ends in .npz gets arrays of `size` x `size` pixels (resized, then centre-cropped; 0 asks
    that all pictures are of one size). Otherwise it is a folder of tar shards of `per_shard` images each, in
    which JPEG, PNG, WebP and BMP files lie unchanged. What an interrupted call has done is kept: whole
    shards, and blocks of an .npz in a folder `out`.part. `track` wraps the work of a split, to show progress.
    Raises DataError if there is nothing to read, or what is there was made from other pictures.
    """
    report = Report()
    splits = {
        split: images
        for split in ("train", "test")
        if (images := read_folder(folder, split, (*EXTENSIONS, *CONVERTIBLE))) is not None
    }
    if out.suffix == ".npz":
        _write_npz(splits, out, size, track, report)
    else:
        out.mkdir(parents=True, exist_ok=True)
        if splits["train"].labels is not None:
            _write_whole(out / CLASS_NAMES, splits["train"].classes)
        for split, images in splits.items():
            _write_shards(images, out, "train" if split == "train" else "val", per_shard, track, report)
    return report


def _write_shards(
    images: FileImages, out: Path, split: str, per_shard: int, track: Track, report: Report
) -> None:
    _check_same_source(images, out / f"{split}.txt", f"{per_shard} images a shard")
    listed = _listed(out / LEFT_OUT)
    for start in track(range(0, len(images), per_shard), f"{split} shards"):
        shard = out / f"{split}-{start // per_shard:06d}.tar"
        numbers = range(start, min(start + per_shard, len(images)))
        if shard.exists():
            _report_kept(shard, images, numbers, listed, report)
            continue
        # A shard gets its name when it is whole: what an interruption leaves is never taken for one.
        unfinished = shard.with_suffix(".tar.part")
        with tarfile.open(unfinished, "w") as archive:
            for image in numbers:
                _add_sample(archive, images, image, report)
        new = [reason for reason in report.left_out.values() if reason not in listed]
        with (out / LEFT_OUT).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{reason}\n" for reason in new)
        listed += new
        os.replace(unfinished, shard)


def _listed(listing: Path) -> list[str]:
    """Why pictures were left out so far, a line each."""
    return (
        listing.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if listing.exists() else []
    )


def _report_kept(shard: Path, images: FileImages, numbers: range, listed: list[str], report: Report) -> None:
    """What a call before made of the pictures `numbers`, of which its `shard` is whole."""
    try:
        with tarfile.open(shard) as archive:
            kept = {int(name.partition(".")[0]) for name in archive.getnames()}
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"shard {str(shard)!r} of a call before cannot be read ({error}). Remove it, and call again."
        ) from error
    for image in numbers:
        name = images.name(image)
        if image not in kept:
            report.left_out[name] = next(
                (reason for reason in listed if repr(name) in reason), f"image {name!r} was left out before."
            )
            continue
        report.written += 1
        if not _stays(images, image):
            report.converted.append(name)


def _check_same_source(images: FileImages, record: Path, options: str) -> None:
    """What the pictures are, and in which order, stands beside the work, so that a later call cannot go on
    with another folder.
    """
    lines = (options, *(images.name(image) for image in range(len(images))))
    if not record.exists():
        _write_whole(record, lines)
    elif record.read_bytes() != _encoded_lines(lines):
        raise DataError(
            f"{str(record.parent)!r} holds work on other pictures, or with other options, of a call before. "
            "Remove it, or write elsewhere."
        )


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    """By renaming: an interruption leaves the whole file, or none."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(_encoded_lines(lines))
    os.replace(unfinished, path)


def _encoded_lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


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
    if _stays(images, image):
        decode(encoded, name)
        return encoded.tobytes(), _ending(images, image)
    out = io.BytesIO()
    picture(encoded, name).save(out, "JPEG", quality=_JPEG_QUALITY)
    report.converted.append(name)
    return out.getvalue(), "jpg"


def _stays(images: FileImages, image: int) -> bool:
    """Whether the file is put into a shard as it is."""
    return _ending(images, image) in EXTENSIONS


def _ending(images: FileImages, image: int) -> str:
    return images.paths[image].suffix[1:].lower()


def picture(encoded: NDArray[np.uint8], name: str) -> Image.Image:
    """The upright RGB picture of any format that Pillow opens, with pillow-heif's help if that is installed.
    Raises DataError otherwise.
    """
    _register_heif()
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except (*BROKEN, RuntimeError, EOFError) as error:
        hint = (
            " Install pillow-heif, and prepare into an empty place again."
            if Path(name).suffix.lower() in (".heic", ".heif")
            else ""
        )
        reason = "Pillow does not know its format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"image {name!r} cannot be converted ({reason}).{hint}") from error


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _write_npz(splits: dict[str, FileImages], out: Path, size: int, track: Track, report: Report) -> None:
    """By way of blocks in a folder beside `out`, which an interrupted call finds again. `out` appears when it
    is whole.
    """
    parts = out.with_name(f"{out.name}.part")
    parts.mkdir(parents=True, exist_ok=True)
    blocks = {split: _written_blocks(images, parts, split, size, track) for split, images in splits.items()}
    unfinished = parts / "whole.npz"
    with zipfile.ZipFile(unfinished, "w") as archive:
        for split, images in splits.items():
            kept = _join_blocks(archive, blocks[split], split, parts, report)
            if images.labels is not None:
                _add_array(archive, f"{split}_y", images.labels[kept])
        if splits["train"].labels is not None:
            _add_array(archive, "classes", np.array(splits["train"].classes))
    os.replace(unfinished, out)
    shutil.rmtree(parts)


def _written_blocks(images: FileImages, parts: Path, split: str, size: int, track: Track) -> list[Path]:
    """Files of `_BLOCK` pictures each, of which those that are there already are kept."""
    _check_same_source(images, parts / f"{split}.txt", f"--size {size}")
    blocks = []
    for start in track(range(0, len(images), _BLOCK), f"{split} images, by {_BLOCK}"):
        blocks.append(parts / f"{split}-{start // _BLOCK:06d}.npz")
        if not blocks[-1].exists():
            _write_block(images, range(start, min(start + _BLOCK, len(images))), blocks[-1], size)
    return blocks


def _write_block(images: FileImages, numbers: range, block: Path, size: int) -> None:
    """Pixels of the pictures that can be read, their numbers, and the names of the others with the reasons."""
    pixels, kept, left_out = [], [], {}
    for image in numbers:
        name = images.name(image)
        try:
            pixels.append(_pixels(picture(images.read(image), name), size))
        except DataError as error:
            left_out[name] = str(error)
            continue
        kept.append(image)
    _require_one_size({array.shape[:2] for array in pixels}, block.parent)
    unfinished = block.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        stacked = np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)
        np.savez(
            file,
            pixels=stacked,
            kept=np.array(kept, np.int64),
            names=np.array([*left_out], "U"),
            reasons=np.array([*left_out.values()], "U"),
        )
    os.replace(unfinished, block)


def _join_blocks(
    archive: zipfile.ZipFile, blocks: list[Path], split: str, parts: Path, report: Report
) -> NDArray[np.int64]:
    """Write the pixels of all blocks as one array, one block in memory at a time; returns the numbers of the
    pictures in it.
    """
    kept, shapes = [], set()
    for block in blocks:
        with np.load(block) as content:
            kept.append(content["kept"])
            report.left_out |= dict(zip(content["names"].tolist(), content["reasons"].tolist(), strict=True))
            if len(kept[-1]):
                shapes.add(content["pixels"].shape[1:])
    numbers = np.concatenate(kept)
    if len(numbers) == 0:
        shutil.rmtree(parts)
        raise DataError(
            f"not one of the {split} pictures can be read; the last one: {[*report.left_out.values()][-1]}"
        )
    _require_one_size(shapes, parts)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(numbers), *shapes.pop())}
    with archive.open(f"{split}_x.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            with np.load(block) as content:
                file.write(content["pixels"].tobytes())
    report.written += len(numbers)
    return numbers


def _add_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _require_one_size(shapes: set[tuple[int, ...]], parts: Path) -> None:
    if len(shapes) > 1:
        # The same call could never be finished, and one with --size makes other blocks.
        shutil.rmtree(parts)
        first, *_, last = sorted(shapes)
        raise DataError(
            f"the pictures are of several sizes, such as {first[1]}x{first[0]} and {last[1]}x{last[0]}. "
            "Give one with --size."
        )


def _pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) if size else image)


def untracked(work: Iterable[int], _: str) -> Iterator[int]:
    """The `track` of a call that shows nothing."""
    yield from work
