"""Data sets to transfer to: by name, as a folder, or as one .npz."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgessl import pipelines
from fastgessl.config import UsageError
from fastgessl.evaluate.cache import subset
from fastgessl.evaluate.suite import held_out_test
from fastgessl.pipelines.sources.images import Images


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
        if self.test is not None or self.train.labels is None:
            return torch.empty(0, dtype=torch.int64)
        return held_out_test(torch.from_numpy(self.train.labels), seed)[1]

    def splits(self, seed: int) -> tuple[Images, Images]:
        """Training and test images: without a test split those that are not held out and those that are;
        without labels all, twice.
        """
        if self.test is not None or self.train.labels is None:
            return self.train, self.train if self.test is None else self.test
        held = self.held_out(seed).numpy()
        kept = np.setdiff1d(np.arange(len(self.train)), held)
        return subset(self.train, kept), subset(self.train, held)


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
