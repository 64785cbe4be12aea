"""Data sets by name: your own (npz, folder, list, shards), ImageNet and its relatives in the layouts in which
they are handed out, and what torchvision reads; and how those that may be fetched are.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.folder import read_folder, read_list
from fastgessl.pipelines.sources.images import ArrayImages, FileImages, Images, numbered_classes
from fastgessl.pipelines.sources.npz import read_npz
from fastgessl.pipelines.sources.shards import read_shards

# Fixes which third of the digits is held out, for every run and every seed.
_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST = 599
_TINY = "tiny-imagenet-200"
_TINY_URL = f"http://cs231n.stanford.edu/{_TINY}.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
# Tian et al., "Contrastive Multiview Coding", ECCV 2020: the 100 classes that "ImageNet-100" has meant since.
_IMAGENET100_NAMES = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303
"""
IMAGENET100 = frozenset(_IMAGENET100_NAMES.split())


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


def _imported(module: str, name: str) -> Any:
    """A module that the data set `name` is read with."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"data.name {name} is read with {module.partition('.')[0]}, which does not import ({error}). "
            "Install fastgessl[train]."
        ) from error


def _digits(split: str) -> ArrayImages:
    """scikit-learn's bundled digits, 1,797 real handwritten ones of 8 x 8 pixels in 17 grey levels; a
    stratified third is the test.
    """
    digits = _imported("sklearn.datasets", "digits").load_digits()
    train, test = _imported("sklearn.model_selection", "digits").train_test_split(
        np.arange(len(digits.target)),
        test_size=_DIGITS_TEST,
        stratify=digits.target,
        random_state=_DIGITS_SPLIT_SEED,
    )
    rows = np.sort(train if split == "train" else test)
    grey = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return ArrayImages(
        np.repeat(grey[..., None], 3, axis=3),
        digits.target[rows].astype(np.int64),
        tuple(map(str, digits.target_names)),
    )


def _imagenet(root: Path, split: str) -> FileImages | None:
    """train/<class>/*.JPEG and val/<class>/*.JPEG under `root`; None without val. Raises DataError if there
    is no train.
    """
    if not (root / "train").is_dir():
        raise DataError(
            f"data.root {str(root)!r} has no folder 'train'. Put the photos at train/<class>/*.JPEG and "
            "val/<class>/*.JPEG under it, "
            "unpacked from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org."
        )
    return read_folder(root, split)


def _imagenet100(root: Path, split: str) -> FileImages | None:
    """The 100 classes out of a whole ImageNet, or a folder in its layout that holds no more than 100 classes.

    Raises DataError if neither is there.
    """
    images = _imagenet(root, split)
    if images is None or len(images.classes) <= 100:
        return images
    if missing := sorted(IMAGENET100 - set(images.classes)):
        raise DataError(
            f"data.root {str(root)!r} has {len(images.classes)} classes, but {len(missing)} of "
            "ImageNet-100's are missing, such as "
            f"{missing[0]}. Put the whole ImageNet there, or a folder with the 100 classes alone."
        )
    assert images.labels is not None  # a folder of more than 100 classes has labels
    classes = tuple(sorted(IMAGENET100))
    number = np.array([classes.index(name) if name in IMAGENET100 else -1 for name in images.classes])
    labels = number[images.labels]
    kept = np.flatnonzero(labels >= 0)
    return FileImages(tuple(images.paths[row] for row in kept), labels[kept], classes)


def _tinyimagenet(root: Path, split: str) -> FileImages:
    """`root` or `root`/tiny-imagenet-200 as it is handed out: train/<class>/images/*.JPEG, val/images/*.JPEG,
    val/val_annotations.txt.

    The 10,000 images of val are the test; those of test have no public labels. Raises DataError if a part is
    missing.
    """
    base = root / _TINY if (root / _TINY).is_dir() else root
    annotations = base / "val" / "val_annotations.txt"
    if not (base / "train").is_dir() or not annotations.is_file():
        raise DataError(
            f"data.root {str(root)!r} holds no whole {_TINY} (wanted train/<class>/images/*.JPEG and "
            "val/val_annotations.txt). Put the "
            f"folder {_TINY} there, unpacked from http://cs231n.stanford.edu/{_TINY}.zip, or run `fastgessl "
            f"prepare tinyimagenet {root}`."
        )
    train = read_folder(base, "train")
    assert train is not None
    if split == "train":
        return train
    number = {name: label for label, name in enumerate(train.classes)}
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
    try:
        labels = np.array([number[name] for _, name in rows], dtype=np.int64)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{annotations} does not hold lines of <file> <class> with classes of train ({error}). Unpack "
            "it again."
        ) from error
    return FileImages(tuple(base / "val" / "images" / file for file, _ in rows), labels, train.classes)


def _torchvision(name: str, root: Path, split: str) -> ArrayImages | FileImages:
    """The `split` of SETS[name] under `root`. Nothing is downloaded or unpacked; raises DataError that says
    what belongs where.
    """
    wanted = SETS[name]
    kind = getattr(_imported("torchvision.datasets", name), wanted.class_name)
    try:
        parts = [kind(str(root), **part) for part in (wanted.train if split == "train" else wanted.test)]
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". You can")[0].rstrip(".")
        raise DataError(
            f"data.root {str(root)!r} holds no whole {wanted.class_name} ({reason}). Put the unpacked "
            f"folder {wanted.folder} there; or put "
            f"{wanted.archives} of {wanted.page} there and run `fastgessl prepare {name} {root}`, which "
            "also downloads where it can."
        ) from error
    labelled = wanted.labelled or split == "test"
    classes = tuple(getattr(parts[0], "classes", ()))
    if hasattr(parts[0], "data"):
        # CIFAR has (N, H, W, 3) and `targets`, STL-10 (N, 3, H, W) and `labels`.
        (data,) = parts
        pixels = data.data if data.data.shape[-1] == 3 else data.data.transpose(0, 2, 3, 1)
        numbers = np.asarray(data.targets if hasattr(data, "targets") else data.labels, dtype=np.int64)
        images = np.ascontiguousarray(pixels)
        return ArrayImages(images, numbers, classes) if labelled else ArrayImages(images)
    # torchvision opens one file at a time; DALI wants their names.
    paths = tuple(Path(path) for part in parts for path in part._image_files)
    labels = np.array([label for part in parts for label in part._labels], dtype=np.int64)
    return FileImages(paths, labels, classes or numbered_classes(int(labels.max()), name))


_READERS: dict[str, Callable[[Path, str], Images | None]] = {
    "npz": read_npz,
    "folder": read_folder,
    "list": read_list,
    "shards": read_shards,
    "imagenet": _imagenet,
    "imagenet100": _imagenet100,
    "tinyimagenet": _tinyimagenet,
}
NAMES = ("digits", *_READERS, *SETS)
FETCHABLE = (*SETS, "tinyimagenet")


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
    return _torchvision(name, root, split) if name in SETS else _READERS[name](root, split)


def fetch(name: str, root: Path) -> None:
    """Put the data set `name`, one of FETCHABLE, under `root`, in the layout that `open_images` reads:
    downloaded where the network allows, unpacked where the archive already lies there. Raises DataError where
    neither succeeds.
    """
    root.mkdir(parents=True, exist_ok=True)
    datasets, wanted = _imported("torchvision.datasets", name), SETS.get(name)
    belongs = f"{wanted.archives} of {wanted.page}" if wanted else _TINY_URL
    try:
        if wanted is not None:
            for part in (*wanted.train, *wanted.test):
                getattr(datasets, wanted.class_name)(str(root), **part, download=True)
        elif not (root / _TINY / "val" / "val_annotations.txt").is_file():
            datasets.utils.download_and_extract_archive(_TINY_URL, str(root), md5=_TINY_MD5)
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} could not be downloaded ({reason}). Put {belongs} into {str(root)!r} and run this again."
        ) from error
