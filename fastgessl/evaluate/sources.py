"""Data sets and their splits: which images a probe learns from and which it is judged on. Seeded, stratified,
from training labels alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgessl import pipelines
from fastgessl.config import UsageError
from fastgessl.pipelines.sources.images import Images

HELD_OUT_FRACTION = 0.2
# The fields of `fastgessl.pipelines.sources.images` that hold a value for each image.
PER_IMAGE = ("images", "paths", "names", "shard", "offset", "length", "labels")


@dataclass(frozen=True)
class Source:
    """A data set with its splits."""

    name: str
    train: Images
    test: Images | None
    """None without a test split."""

    @property
    def slug(self) -> str:
        """The name as a part of a file's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name)

    def held_out(self, seed: int) -> Tensor:
        """(H,) int64, increasing: the training images that probes are judged on; none with a test split or
        without labels.

        Drawn from the labels of the whole data set: training, probes and supervised models leave out the same
        images, whichever files are found to be bad on the way.
        """
        labels = labels_of(self.train)
        if self.test is not None or labels is None:
            return torch.empty(0, dtype=torch.int64)
        return held_out_test(labels, seed)[1]

    def splits(self, seed: int) -> tuple[Images, Images]:
        """Training and test images: without a test split those that are not held out and those that are;
        without labels all, twice.
        """
        if self.test is not None or self.train.labels is None:
            return self.train, self.train if self.test is None else self.test
        held = self.held_out(seed).numpy()
        return subset(self.train, np.setdiff1d(np.arange(len(self.train)), held)), subset(self.train, held)


def open_source(name: str, root: Path | None, shown: str = "") -> Source:
    """Both splits of a data set as `pipelines.open_images` knows it; `shown` is its name in tables."""
    train = pipelines.open_images(name, root)
    assert train is not None  # only a test split can be absent
    return Source(shown or name, train, pipelines.open_images(name, root, "test"))


def open_transfer(specification: str) -> Source:
    """NAME=ROOT, NAME alone where it needs no files (digits), a folder of images, or an .npz. UsageError if
    it is none of them.

    >>> open_transfer("digits").name
    'digits'
    """
    name, found, root = specification.partition("=")
    if found and not Path(specification).exists():
        return open_source(name, Path(root))
    path = Path(specification)
    if path.is_dir():
        return open_source("folder", path, path.name)
    if path.suffix == ".npz":
        return open_source("npz", path, path.stem)
    if path.exists() or "/" in specification:
        raise UsageError(
            f"evaluate.transfer '{specification}' is neither a folder nor an .npz"
            + ("." if path.exists() else ", and does not exist.")
            + " Give NAME=ROOT (cifar100=/data), a folder of images, or an .npz with train_x and train_y."
        )
    return open_source(specification, None)


def labels_of(images: Images) -> Tensor | None:
    """Labels (N,) int64; None without labels."""
    return None if images.labels is None else torch.from_numpy(images.labels)


def subset(images: Images, rows: np.ndarray) -> Images:
    """The images `rows`, (M,) int64, numbered again from 0.

    >>> len(subset(pipelines.ArrayImages(np.zeros((3, 4, 4, 3), dtype=np.uint8)), np.array([2, 0])))
    2
    """
    kept: dict[str, Any] = {}
    for name in PER_IMAGE:
        values = getattr(images, name, None)
        if isinstance(values, np.ndarray):
            kept[name] = values[rows]
        elif isinstance(values, tuple):
            kept[name] = tuple(values[row] for row in rows)
    return replace(images, **kept)


def numbered(images: Images, classes: Tensor) -> Images:
    """The same images with labels that are positions in `classes` (C,), increasing."""
    labels = labels_of(images)
    assert labels is not None
    return replace(images, labels=torch.searchsorted(classes, labels).numpy())


def hold_out(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row numbers (kept, held), both increasing; `fraction` of each class of `labels` (N,) is held, never a
    whole class.

    A class of one or two images gives none away at a fifth, so `held` may be empty.

    >>> kept, held = hold_out(torch.tensor([0] * 10 + [1] * 5), 0.2, torch.Generator().manual_seed(0))
    >>> len(kept), (held < 10).sum().item(), (held >= 10).sum().item()
    (12, 2, 1)
    """
    held = _drawn(labels, lambda count: min(round(fraction * count), count - 1), generator)
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def _drawn(labels: Tensor, take: Callable[[int], int], generator: torch.Generator) -> Tensor:
    """Which rows of `labels` (N,) are drawn, (N,) bool: `take(n)` of each class of n."""
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        drawn[members[order[: take(len(members))]]] = True
    return drawn


def held_out_test(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (kept, held) of the training images, in the order of their index, that train and judge the probes
    without a test split.

    >>> [len(rows) for rows in held_out_test(torch.zeros(10, dtype=torch.int64), seed=0)]
    [8, 2]
    """
    return hold_out(labels, HELD_OUT_FRACTION, torch.Generator().manual_seed(seed))


def draw_labelled(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Row numbers of `per_class` random images of each class, (C·per_class,).

    Raises UsageError if a class has fewer.

    >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])
    >>> labels[draw_labelled(labels, 2, torch.Generator().manual_seed(0))]
    tensor([0, 0, 1, 1])
    """
    obstacle = too_few_labels(labels, per_class)
    if obstacle:
        raise UsageError(obstacle)
    shuffled = torch.randperm(len(labels), generator=generator)
    return torch.cat([shuffled[labels[shuffled] == label][:per_class] for label in labels.unique()])


def draw_fraction(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Row numbers, increasing: `fraction` of each class of `labels` (N,), rounded, at least one image.

    >>> draw_fraction(torch.tensor([0] * 20 + [1] * 3), 0.1, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    return _drawn(labels, lambda count: max(1, round(fraction * count)), generator).nonzero().squeeze(1)


def too_few_labels(labels: Tensor, per_class: int) -> str:
    """Why `per_class` labelled images per class cannot be drawn; empty if they can."""
    classes, counts = labels.unique(return_counts=True)
    fewest, smallest = int(counts.min()), int(classes[counts.argmin()])
    if fewest >= per_class:
        return ""
    return (
        f"evaluate.labels_per_class is {per_class}, but class {smallest} has only {fewest} training images. "
        f"Choose --evaluate.labels_per_class {fewest} or less."
    )


def unusable_labels(train: Tensor | None, test: Tensor | None) -> str:
    """Why these labels, (N,) and (M,) int64, do not allow a classifier to be trained and judged; empty if
    they do.
    """
    if train is None or test is None:
        split = "training" if train is None else "test"
        return f"the {split} images have no labels. Add labels, or choose --evaluate.tasks geometry."
    if len(test) == 0:
        return (
            "there is no test split, and no class has the three images that a fifth can be held out of. Add "
            "test images."
        )
    classes = train.unique()
    if len(classes) < 2:
        return (
            f"all {len(train)} training images are of class {int(classes[0])}, so there is nothing to tell "
            "apart. Add a second class."
        )
    unseen = test.unique()[~torch.isin(test.unique(), classes)]
    if len(unseen):
        shown = ", ".join(str(int(label)) for label in unseen[:5])
        return (
            f"{len(unseen)} classes of the test images (labels {shown}) have no training image, so no probe "
            "can know them. Add training images of these classes, or leave them out of the test split."
        )
    return ""


def require_labels(task: str, train: Tensor | None, test: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both labels, or UsageError, naming the task, if they do not allow it."""
    obstacle = unusable_labels(train, test)
    if obstacle or train is None or test is None:
        raise UsageError(f"Task {task}: {obstacle}")
    return train, test


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set before its features are."""

    train: Tensor | None
    """Labels (N,) that probes learn from; None without labels."""
    test: Tensor | None
    """Labels (M,) that they are judged by."""
    pool: Tensor | None = None
    """Labels of the images that few-shot episodes are drawn from; None for those of `test`."""
    views: bool = False
    """Whether two augmented views of each image can be had."""
    width: int = 0
    """F of the widest encoder; 0 while it is not known."""

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """(train, test) of a labelled data set."""
        assert self.train is not None and self.test is not None
        return self.train, self.test
