"""ImageNet, its subset of 100 classes, and TinyImageNet: folders of photos in the layouts in which they are
handed out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.folder import read_folder
from fastgessl.pipelines.sources.images import FileImages

TINY = "tiny-imagenet-200"
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


def read_imagenet(root: Path, split: str) -> FileImages | None:
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


def read_imagenet100(root: Path, split: str) -> FileImages | None:
    """The 100 classes out of a whole ImageNet, or a folder in its layout that holds no more than 100 classes.

    Raises DataError if neither is there.
    """
    images = read_imagenet(root, split)
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


def read_tinyimagenet(root: Path, split: str) -> FileImages:
    """`root` or `root`/tiny-imagenet-200 as it is handed out: train/<class>/images/*.JPEG, val/images/*.JPEG,
    val/val_annotations.txt.

    The 10,000 images of val are the test; those of test have no public labels. Raises DataError if a part is
    missing.
    """
    base = root / TINY if (root / TINY).is_dir() else root
    annotations = base / "val" / "val_annotations.txt"
    if not (base / "train").is_dir() or not annotations.is_file():
        raise DataError(
            f"data.root {str(root)!r} holds no whole {TINY} (wanted train/<class>/images/*.JPEG and "
            "val/val_annotations.txt). Put the "
            f"folder {TINY} there, unpacked from http://cs231n.stanford.edu/{TINY}.zip, or run `fastgessl "
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
