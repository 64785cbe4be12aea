"""Images from a folder, nested (the first level names the class) or flat (no labels), or from a list."""

import os
import warnings
from pathlib import Path

import numpy as np

from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import FileImages, numbered_classes

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
# What phones, scanners and old collections hold besides, and `fastgessl prepare` converts.
CONVERTIBLE = ("heic", "heif", "avif", "tif", "tiff", "gif", "jp2", "jxl", "jfif", "mpo", "psd", "ppm", "tga")
_NAMED = 3
_ENDINGS = (*EXTENSIONS, *CONVERTIBLE)


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
    others = [path.relative_to(root).as_posix() for path in files if path.suffix[1:].lower() not in endings]
    convert = ""
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        convert = (
            f"Files of formats that are not read here: {', '.join(others[:_NAMED])}{more}. `fastgessl "
            "prepare FOLDER OUT` converts them."
        )
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
        shown = [name for name in files if not name.startswith(".")]
        paths += [Path(folder, name) for name in shown if name.rpartition(".")[2].lower() in _ENDINGS]
    return sorted(paths), len(seen)


def read_list(root: Path, split: str) -> FileImages | None:
    """The `split` ("train" or "test") of a list; None without test images.

    `root` is the list itself, or a folder with train.txt and perhaps val.txt or test.txt. A line is a path,
    relative to the list, and a label after a tab: a number from 0, or a name. A number after a space is taken
    for a label too. Raises DataError if the list is missing or empty, or if some lines have a label and
    others have none.
    """
    if root.is_dir():
        train = root / "train.txt"
        held_out = next((root / name for name in ("val.txt", "test.txt") if (root / name).is_file()), None)
    else:
        train, held_out = root, None
    lines = _lines(train)
    if split == "train":
        return _images(train, lines, _classes(lines, train))
    return None if held_out is None else _images(held_out, _lines(held_out), _classes(lines, train))


def _lines(path: Path) -> list[tuple[str, str]]:
    """(image, label or '') for each line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"data.root: the list {str(path)!r} cannot be read ({error.strerror}). Point --data.root at a "
            "list of images."
        ) from error
    lines = [_parts(line) for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"the list {str(path)!r} names no images. Write one path a line.")
    bare = sum(not label for _, label in lines)
    if bare not in (0, len(lines)):
        first = next(image for image, label in lines if not label)
        raise DataError(
            f"the list {str(path)!r}: {bare} of {len(lines)} lines have no label (first: {first!r}). Label "
            "all, or none."
        )
    return lines


def _parts(line: str) -> tuple[str, str]:
    if "\t" in line:
        image, _, label = line.strip().rpartition("\t")
        return image.strip(), label.strip()
    image, _, label = line.strip().rpartition(" ")
    return (image.strip(), label) if image and label.isdecimal() else (line.strip(), "")


def _classes(lines: list[tuple[str, str]], path: Path) -> tuple[str, ...]:
    """Numbers count from 0, names are sorted."""
    labels = {label for _, label in lines}
    if not any(labels):
        return ()
    if all(label.isdecimal() for label in labels):
        return numbered_classes(max(map(_number, labels)), f"the list {str(path)!r}")
    return tuple(sorted(labels))


def _number(digits: str) -> int:
    """Python refuses to read numbers of thousands of digits; the first twenty tell that it is no class."""
    return int(digits.lstrip("0")[:20] or 0)


def _images(path: Path, lines: list[tuple[str, str]], classes: tuple[str, ...]) -> FileImages:
    paths = tuple(path.parent / image for image, _ in lines)
    if not classes or not lines[0][1]:
        return FileImages(paths)
    number = {name: label for label, name in enumerate(classes)}
    labels = [str(_number(label)) if label.isdecimal() else label for _, label in lines]
    if unknown := sorted(set(labels) - set(classes)):
        raise DataError(
            f"the list {str(path)!r} has the classes {', '.join(unknown[:5])}, which the training images do "
            "not have. Rename them."
        )
    return FileImages(paths, np.array([number[label] for label in labels], dtype=np.int64), classes)
