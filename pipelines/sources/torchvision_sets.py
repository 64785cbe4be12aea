"""Data sets whose files torchvision reads: CIFAR-10 and -100, STL-10, Flowers102, Food101, FGVC-Aircraft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.images import ArrayImages, FileImages


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set as torchvision has it."""

    class_name: str
    folder: str
    """What lies under the root once it is unpacked."""
    archives: str
    """What to fetch by hand, and where it belongs under the root."""
    page: str
    train: tuple[dict[str, Any], ...]
    """Arguments that select the training images: one for each part of torchvision's that belongs to them."""
    test: tuple[dict[str, Any], ...]
    labelled: bool = True
    """Whether the training images have labels."""


_SPLITS = ({"split": "train"},), ({"split": "test"},)
_CIFAR = ({"train": True},), ({"train": False},)
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_STL10 = ("STL10", "stl10_binary", "stl10_binary.tar.gz", "http://ai.stanford.edu/~acoates/stl10")

SETS = {
    "cifar10": TorchvisionSet(
        "CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz", _CIFAR_PAGE, *_CIFAR
    ),
    "cifar100": TorchvisionSet(
        "CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz", _CIFAR_PAGE, *_CIFAR
    ),
    "stl10": TorchvisionSet(*_STL10, *_SPLITS),
    "stl10_unlabeled": TorchvisionSet(
        *_STL10, ({"split": "train+unlabeled"},), ({"split": "test"},), labelled=False
    ),
    "flowers102": TorchvisionSet(
        "Flowers102",
        "flowers-102",
        "flowers-102/102flowers.tgz, flowers-102/imagelabels.mat and flowers-102/setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        ({"split": "train"}, {"split": "val"}),
        ({"split": "test"},),
    ),
    "food101": TorchvisionSet(
        "Food101",
        "food-101",
        "food-101.tar.gz",
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
        *_SPLITS,
    ),
    "aircraft": TorchvisionSet(
        "FGVCAircraft",
        "fgvc-aircraft-2013b",
        "fgvc-aircraft-2013b.tar.gz",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        ({"split": "trainval"},),
        ({"split": "test"},),
    ),
}


def read_torchvision(name: str, root: Path, split: str) -> ArrayImages | FileImages:
    """The `split` of SETS[name] under `root`. Nothing is downloaded or unpacked; raises DataError that says
    what belongs where.
    """
    wanted = SETS[name]
    parts = wanted.train if split == "train" else wanted.test
    try:
        opened = [_opened(wanted, root, part) for part in parts]
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". You can")[0].rstrip(".")
        raise DataError(
            f"data.root {str(root)!r} holds no whole {wanted.class_name} ({reason}). Put the unpacked "
            f"folder {wanted.folder} there; or put "
            f"{wanted.archives} of {wanted.page} there and run `fastgessl prepare {name} {root}`, which "
            "also downloads where it can."
        ) from error
    labelled = wanted.labelled or split == "test"
    return _arrays(opened[0], labelled) if hasattr(opened[0], "data") else _files(opened)


def fetch_torchvision(name: str, root: Path) -> None:
    """Download what is not there yet and unpack it, by torchvision. Raises DataError where that does not
    succeed.
    """
    wanted = SETS[name]
    try:
        for part in (*wanted.train, *wanted.test):
            _opened(wanted, root, part, download=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} could not be downloaded ({reason}). Put {wanted.archives} of {wanted.page} into "
            f"{str(root)!r} and run this again."
        ) from error


def _opened(wanted: TorchvisionSet, root: Path, part: dict[str, Any], download: bool = False) -> Any:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise DataError(
            f"{wanted.class_name} is read with torchvision, which does not import ({error}). Install "
            "fastgessl[train]."
        ) from error
    return getattr(torchvision.datasets, wanted.class_name)(str(root), **part, download=download)


def _arrays(data: Any, labelled: bool) -> ArrayImages:
    """CIFAR has (N, H, W, 3) and `targets`, STL-10 (N, 3, H, W) and `labels`."""
    pixels = data.data if data.data.shape[-1] == 3 else data.data.transpose(0, 2, 3, 1)
    labels = data.targets if hasattr(data, "targets") else data.labels
    classes = tuple(getattr(data, "classes", ()))
    return ArrayImages(
        np.ascontiguousarray(pixels),
        np.asarray(labels, dtype=np.int64) if labelled else None,
        classes if labelled else (),
    )


def _files(parts: Sequence[Any]) -> FileImages:
    """torchvision opens one file at a time; DALI wants their names."""
    paths = tuple(Path(path) for part in parts for path in part._image_files)
    labels = np.array([label for part in parts for label in part._labels], dtype=np.int64)
    classes = tuple(getattr(parts[0], "classes", ())) or tuple(map(str, range(int(labels.max()) + 1)))
    return FileImages(paths, labels, classes)
