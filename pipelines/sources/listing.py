"""Images from a list of files: one path a line, and perhaps a label behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.class_numbers import numbered_classes
from fastgessl.pipelines.sources.images import FileImages


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
