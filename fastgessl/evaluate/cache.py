"""Features that are extracted once: kept in a folder, in parts, and thrown away as soon as the encoder, an
image or the view changes.

`<folder>/<name>/` holds `key.json`, which says what the features were made of, and `<first
image>.safetensors` parts of at most `PART_IMAGES` images. A part is complete or absent, so an interrupted
extraction goes on with the first part that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgessl.evaluate.features import Features
from fastgessl.evaluate.progress import shown
from fastgessl.pipelines import ArrayImages, ViewSpec
from fastgessl.pipelines.sources.images import Images

# 33 MB of 512 features: some seconds of extraction on a GPU, half an hour on a CPU, is what an interruption
# costs at most.
PART_IMAGES = 16384
# The fields of `fastgessl.pipelines.sources.images` that hold a value for each image.
PER_IMAGE = ("images", "paths", "names", "shard", "offset", "length", "labels")
Extraction = Callable[[Images], tuple[Features, ...]]


@dataclass(frozen=True)
class FeatureCache:
    """A folder of cached features.

    >>> import tempfile
    >>> images = ArrayImages(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    >>> cache = FeatureCache(Path(tempfile.mkdtemp()))
    >>> calls = []
    >>> extract = lambda part: calls.append(len(part)) or (Features(torch.ones(len(part), 2), None, torch.arange(len(part))),)
    >>> [len(cache.features("train", "key", images, extract)[0]) for _ in range(2)], calls
    ([3, 3], [3])
    """

    folder: Path | None
    """Where the features are kept; None keeps nothing."""

    def features(
        self, name: str, key: str, images: Images, extract: Extraction, progress: bool = False
    ) -> tuple[Features, ...]:
        """The features of `images`, one `Features` a view, from the folder `name` where its key is `key`,
        else by `extract`, part by part.

        `extract` numbers the images it is given from 0. Every rank calls this; the first one writes.
        """
        starts = range(0, len(images), PART_IMAGES)
        if self.folder is not None and _is_first_rank():
            _open(self.folder / name, key)
        parts = []
        for start in shown(starts, f"features of {name}", progress and len(starts) > 1):
            chosen = np.arange(start, min(start + PART_IMAGES, len(images)))
            path = None if self.folder is None else self.folder / name / f"{start:09d}.safetensors"
            part = None if path is None else _read(path)
            if not _on_every_rank(part is not None) or part is None:
                part = extract(images if len(starts) == 1 else subset(images, chosen))
                if path is not None and _is_first_rank():
                    _write(path, part)
            parts.append(tuple(replace(view, index=view.index + start) for view in part))
        return tuple(_joined(views) for views in zip(*parts, strict=True))


def subset(images: Images, rows: np.ndarray) -> Images:
    """The images `rows`, (M,) int64, numbered anew from 0.

    >>> len(subset(ArrayImages(np.zeros((3, 4, 4, 3), dtype=np.uint8)), np.array([2, 0])))
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


def digest_of(encoder: nn.Module, images: Images, views: Sequence[ViewSpec], *settings: object) -> str:
    """What cached features depend on, as 64 hexadecimal digits: weights and buffers, images with their
    labels, views, and `settings`.

    An image file counts by its path, size and time of change; reading ImageNet to learn that nothing changed
    would take as long as extracting its features.
    """
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            np.ascontiguousarray(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            ).tobytes()
        )
    digest.update(digest_of_images(images).encode())
    digest.update(json.dumps([asdict(view) for view in views]).encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def digest_of_images(images: Images) -> str:
    """The images and labels of a data set as 64 hexadecimal digits.

    >>> images = ArrayImages(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    >>> digest_of_images(images) == digest_of_images(subset(images, np.array([0, 1])))
    False
    """
    digest = hashlib.sha256(repr(images.classes).encode())
    if images.labels is not None:
        digest.update(images.labels.tobytes())
    if isinstance(images, ArrayImages):
        digest.update(repr(images.images.shape).encode())
        digest.update(np.ascontiguousarray(images.images).data)
        return digest.hexdigest()
    for path in getattr(images, "paths", ()) or getattr(images, "shards", ()):
        digest.update(f"{path}\0{_state_of(path)}\n".encode("utf-8", "surrogateescape"))
    for place in ("shard", "offset", "length"):
        digest.update(np.ascontiguousarray(getattr(images, place, np.empty(0))).tobytes())
    return digest.hexdigest()


def _state_of(path: Path) -> str:
    """Size and time of change of a file; one that is gone is left out of the features, and found again it
    must change them.
    """
    try:
        status = os.stat(path)
    except OSError:
        return "absent"
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _open(folder: Path, key: str) -> None:
    """Make `folder` ready for parts of this key: with those that belong to it, without any that do not."""
    mark = folder / "key.json"
    if mark.is_file() and mark.read_text() == json.dumps(key):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(json.dumps(key))


def _read(path: Path) -> tuple[Features, ...] | None:
    """A part; None if it is absent or damaged."""
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    views = [tensors[f"view{number}"] for number in range(sum(name.startswith("view") for name in tensors))]
    return tuple(Features(view, tensors.get("labels"), tensors["index"]) for view in views)


def _write(path: Path, part: tuple[Features, ...]) -> None:
    """Write by renaming, so that a part is complete or absent."""
    tensors: dict[str, Tensor] = {
        f"view{number}": view.features.contiguous() for number, view in enumerate(part)
    }
    tensors["index"] = part[0].index
    if part[0].labels is not None:
        tensors["labels"] = part[0].labels
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def _joined(views: Sequence[Features]) -> Features:
    labels = [view.labels for view in views if view.labels is not None]
    features, index = torch.cat([view.features for view in views]), torch.cat([view.index for view in views])
    return Features(features, torch.cat(labels) if labels else None, index)


def _is_first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _on_every_rank(holds: bool) -> bool:
    """Whether it holds on all ranks, which otherwise would not agree on what to extract together."""
    if not (dist.is_available() and dist.is_initialized()):
        return holds
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, holds)
    return all(found)
