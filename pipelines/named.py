"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.folder import read_folder
from fastgessl.pipelines.images import ArrayImages, FileImages
from fastgessl.pipelines.npz import read_npz

# Fixes which third of the digits is held out, for every run and every seed.
_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST = 599

_CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
}
NAMES = ("digits", "npz", "folder", "cifar10", "cifar100", "imagenet")


def open_images(name: str, root: str | Path | None = None, split: str = "train") -> ArrayImages | FileImages | None:
    """The images of `split` ("train" or "test") of a data set: digits, npz, folder, cifar10, cifar100 or imagenet.

    None if the data set has no test images. Grey images come as RGB. Nothing is downloaded. Raises DataError if something is missing,
    empty or of the wrong kind; the message says which file belongs where.

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
    if name == "npz":
        return read_npz(root, split)
    if name == "folder":
        return read_folder(root, split)
    return _imagenet(root, split) if name == "imagenet" else _cifar(name, root, split)


def _digits(split: str) -> ArrayImages:
    """scikit-learn's bundled digits, 1,797 real handwritten ones of 8 x 8 pixels in 17 grey levels; a stratified third is the test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(f"data.name digits comes with scikit-learn, which does not import ({error}). Install fastgessl[train].") from error

    digits = load_digits()
    places = np.arange(len(digits.target))
    train, test = train_test_split(places, test_size=_DIGITS_TEST, stratify=digits.target, random_state=_DIGITS_SPLIT_SEED)
    rows = np.sort(train if split == "train" else test)
    grey = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return ArrayImages(np.repeat(grey[..., None], 3, axis=3), digits.target[rows].astype(np.int64), tuple(map(str, digits.target_names)))


def _cifar(name: str, root: Path, split: str) -> ArrayImages:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise DataError(f"data.name {name} is read with torchvision, which does not import ({error}). Install fastgessl[train].") from error

    class_name, folder, archive = _CIFAR[name]
    try:
        # With the archive beside it, torchvision's "download" only checks and unpacks it.
        data = getattr(torchvision.datasets, class_name)(str(root), train=split == "train", download=(root / archive).is_file())
    except RuntimeError as error:
        raise DataError(
            f"data.root {str(root)!r} holds no whole {class_name} ({str(error).splitlines()[0]}). Put {archive} from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html there, or its unpacked folder {folder}."
        ) from error
    return ArrayImages(np.ascontiguousarray(data.data), np.asarray(data.targets, dtype=np.int64), tuple(data.classes))


def _imagenet(root: Path, split: str) -> FileImages | None:
    if not (root / "train").is_dir():
        raise DataError(
            f"data.root {str(root)!r} has no folder 'train'. Put the photos at train/<class>/*.JPEG and val/<class>/*.JPEG under it, "
            "unpacked from the archives of https://image-net.org."
        )
    return read_folder(root, split)
