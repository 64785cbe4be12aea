"""Images from a folder: nested (the first level names the class) or flat (no labels)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.images import FileImages

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
# What phones, scanners and old collections hold besides, and `fastgessl prepare` converts.
CONVERTIBLE = ("heic", "heif", "avif", "tif", "tiff", "gif", "jp2", "jxl", "jfif", "mpo", "psd", "ppm", "tga")
_NAMED = 3
_ENDINGS = tuple("." + ending for ending in (*EXTENSIONS, *CONVERTIBLE))


def read_folder(root: Path, split: str, endings: tuple[str, ...] = EXTENSIONS) -> FileImages | None:
    """The `split` ("train" or "test") of a folder; None without test images.

    Training images are those under root/train, or under root itself if there is no such folder; test images
    those under root/val or root/test beside root/train. Files of other `endings` are no images; a warning
    names those that could be converted. Raises DataError if the folder is missing, unreadable or holds no
    images.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(
            f"data.root {str(root)!r} {what}. Point --data.root at the folder that holds the images."
        )
    if not (root / "train").is_dir():
        return _read(root, endings) if split == "train" else None
    train = _read(root / "train", endings)
    if split == "train":
        return train
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    return None if held_out is None else _read(held_out, endings, train.classes)


def _read(root: Path, endings: tuple[str, ...], classes: tuple[str, ...] | None = None) -> FileImages:
    """Every image under `root`; labels are the first-level folders, numbered by `classes` (their sorted names
    if None).
    """
    files, searched = _find(root)
    paths = [path for path in files if path.suffix[1:].lower() in endings]
    convert = _other_formats([path for path in files if path.suffix[1:].lower() not in endings], root)
    if not paths:
        raise DataError(
            f"data.root {str(root)!r} holds no images (searched {searched} folders for "
            f"{', '.join(endings)}). "
            f"{convert or 'Put images there or point --data.root at the folder that has them.'}"
        )
    if convert:
        warnings.warn(f"{root}: {convert}", stacklevel=2)
    parts = [path.relative_to(root).parts for path in paths]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    loose = sum(len(part) == 1 for part in parts)
    if loose and names:
        warnings.warn(
            f"{root}: {loose} images lie beside {len(names)} folders of images, so folders are not classes "
            "and no image has a label. "
            "Move the loose images away to train with labels.",
            stacklevel=2,
        )
    if loose or (classes is None and len(names) == 1) or classes == ():
        return FileImages(tuple(paths))
    classes = names if classes is None else classes
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(
            f"{root}: the folders {', '.join(unknown[:5])} name classes that the training images do not "
            "have. Rename them."
        )
    number = {name: label for label, name in enumerate(classes)}
    return FileImages(tuple(paths), np.array([number[part[0]] for part in parts], dtype=np.int64), classes)


def _other_formats(paths: list[Path], root: Path) -> str:
    """What is said of pictures that are not shown; empty if there are none."""
    if not paths:
        return ""
    names = ", ".join(path.relative_to(root).as_posix() for path in paths[:_NAMED])
    further = f" and {len(paths) - _NAMED} further" if len(paths) > _NAMED else ""
    return f"Files of formats that are not read here: {names}{further}. `fastgessl prepare FOLDER OUT` converts them."


def _find(root: Path) -> tuple[list[Path], int]:
    """Sorted files under `root` that end like pictures, links followed but no folder entered twice, and the
    number of folders searched.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"data.root: {error.filename!r} cannot be read ({error.strerror}). Check its permissions."
        ) from error

    paths: list[Path] = []
    seen: set[str] = set()
    for folder, inner, files in os.walk(root, followlinks=True, onerror=refuse):
        place = os.path.realpath(folder)
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        # macOS leaves "._photo.jpg" beside "photo.jpg": not an image.
        paths += [Path(folder, name) for name in files if name.lower().endswith(_ENDINGS) and name[0] != "."]
    return sorted(paths), len(seen)
