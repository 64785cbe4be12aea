"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.folder import read_folder
from fastgessl.pipelines.sources.imagenet import read_imagenet, read_imagenet100, read_tinyimagenet
from fastgessl.pipelines.sources.images import ArrayImages, Images
from fastgessl.pipelines.sources.listing import read_list
from fastgessl.pipelines.sources.npz import read_npz
from fastgessl.pipelines.sources.shards import read_shards
from fastgessl.pipelines.sources.torchvision_sets import SETS, read_torchvision

# Fixes which third of the digits is held out, for every run and every seed.
_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST = 599

_READERS: dict[str, Callable[[Path, str], Images | None]] = {
    "npz": read_npz,
    "folder": read_folder,
    "list": read_list,
    "shards": read_shards,
    "imagenet": read_imagenet,
    "imagenet100": read_imagenet100,
    "tinyimagenet": read_tinyimagenet,
}
NAMES = ("digits", *_READERS, *SETS)


def open_images(name: str, root: str | Path | None = None, split: str = "train") -> Images | None:
    """The images of `split` ("train" or "test") of a data set.

    Your own: npz, folder, list, shards. By name: digits, cifar10, cifar100, stl10 (5,000 labelled images),
    stl10_unlabeled (those and 100,000 more, without labels), tinyimagenet, imagenet100, imagenet, flowers102,
    food101, aircraft. None if the data set has no test images. Grey images come as RGB. Nothing is
    downloaded. Raises DataError if something is missing, empty or of the wrong kind; the message says which
    file belongs where.

    >>> test = open_images("digits", split="test")
    >>> test.images.shape, len(test.classes)
    ((599, 8, 8, 3), 10)
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be train or test, found {split!r}.")
    if name not in NAMES:
        raise DataError(f"data.name {name!r} is unknown. Choose one of {', '.join(NAMES)}.")
    if name == "digits":
        return _digits(split)
    if root is None:
        raise DataError(f"data.name {name} needs files, but data.root is empty. Point --data.root at them.")
    root = Path(root).expanduser()
    return read_torchvision(name, root, split) if name in SETS else _READERS[name](root, split)


def _digits(split: str) -> ArrayImages:
    """scikit-learn's bundled digits, 1,797 real handwritten ones of 8 x 8 pixels in 17 grey levels; a
    stratified third is the test.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            f"data.name digits comes with scikit-learn, which does not import ({error}). Install "
            "fastgessl[train]."
        ) from error

    digits = load_digits()
    places = np.arange(len(digits.target))
    train, test = train_test_split(
        places, test_size=_DIGITS_TEST, stratify=digits.target, random_state=_DIGITS_SPLIT_SEED
    )
    rows = np.sort(train if split == "train" else test)
    grey = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return ArrayImages(
        np.repeat(grey[..., None], 3, axis=3),
        digits.target[rows].astype(np.int64),
        tuple(map(str, digits.target_names)),
    )
