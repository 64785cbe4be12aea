"""From a data set to features: the loaders of evaluation, through a cache that extracts once.

Features are kept in a folder, in parts, and thrown away as soon as the encoder, an image or the view changes.
`<folder>/<name>/` holds `key.json`, which says what the features were made of, and `<first
image>.safetensors` parts of at most `PART_IMAGES` images. A part is complete or absent, so an interrupted
extraction continues with the first part that is missing.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastgessl import pipelines, runs
from fastgessl.build import view_specs
from fastgessl.config import Config
from fastgessl.distributed import world_size
from fastgessl.evaluate.features import (
    Features,
    Pixels,
    RowFeatures,
    extract_views,
    gathered,
    is_first_rank,
    view_sample,
    with_progress,
)
from fastgessl.evaluate.sources import PER_IMAGE, Source, subset
from fastgessl.evaluate.subject import untrained_encoder
from fastgessl.pipelines.sources.images import Images

# 33 MB of 512 features: some seconds of extraction on a GPU, half an hour on a CPU, is what an interruption
# costs at most.
PART_IMAGES = 16384
# Batches that estimate the untrained encoder's batch-norm statistics: 20 x 256 images fix a mean to about 1.5
# % of a standard deviation.
CALIBRATION_BATCHES = 20


@dataclass(frozen=True)
class Extractor:
    """Extracts features of data sets under one configuration; every rank calls every method."""

    config: Config
    accelerator: Accelerator
    cache: Path | None = None
    """The folder that keeps features; None keeps none."""
    quiet: bool = False
    """Shows no progress, for want of a bar or because another is up."""

    @property
    def progress(self) -> bool:
        """Whether this process shows how far it is."""
        return self.accelerator.is_main_process and not self.quiet

    @property
    def still(self) -> pipelines.ViewSpec:
        """The view without augmentation."""
        views = self.config.views
        return pipelines.evaluation_view(views.size, mean=views.mean, std=views.std)

    @property
    def pair(self) -> list[pipelines.ViewSpec]:
        """Two augmented views of full size, as in training."""
        return [replace(spec, repeat=1) for spec in view_specs(self.config) for _ in range(spec.repeat)][:2]

    def loader(
        self,
        images: Images,
        views: Sequence[pipelines.ViewSpec],
        *,
        sharded: bool = True,
        batch_size: int = 0,
        training: bool = False,
    ) -> pipelines.Loader:
        """Every image once, in order, this rank's part of them if `sharded`; in `training` in a new order
        per epoch, whole batches only.

        `batch_size` 0 is evaluation's own.
        """
        ranks = world_size() if sharded else 1
        return pipelines.build(
            images,
            views,
            batch_size=(batch_size or self.config.evaluate.batch_size) * ranks,
            engine=self.config.data.engine,
            device=self.accelerator.device,
            rank=self.accelerator.process_index if sharded else 0,
            world_size=ranks,
            seed=self.config.train.seed,
            training=training,
            workers=self.config.data.workers,
            resident_limit=self.config.data.resident_limit,
            bad_files=self.config.data.bad_files,
            bad_list=Path(self.accelerator.project_dir) / "bad_files.txt",
        )

    def training_views(self, images: Images, batch_size: int) -> pipelines.Loader:
        """Batches of the views that training sees, each image once, in order and always the same."""
        return self.loader(images, view_specs(self.config), sharded=False, batch_size=batch_size)

    def features(
        self, row: str, encoder: nn.Module, name: str, images: Images, views: Sequence[pipelines.ViewSpec]
    ) -> tuple[Features, ...]:
        """Features of `images`, one `Features` per view; kept under `row` and `name`, except raw pixels,
        which cost nothing to make again.
        """
        raw = isinstance(encoder, Pixels)
        device = torch.device("cpu") if raw else self.accelerator.device

        def extract(part: Images) -> tuple[Features, ...]:
            with closing(self.loader(part, views)) as loader:
                return extract_views(encoder, loader, device, self.progress)

        if self.cache is None or raw:
            return extract(images)
        key = digest_of(encoder, images, views, self.config.train.seed)
        return cached(self.cache / re.sub("[ /:]", "-", f"{row}-{name}"), key, images, extract)

    def row(
        self, name: str, encoder: nn.Module, source: Source, *, with_views: bool, whole_pool: bool = False
    ) -> RowFeatures:
        """All features of one encoder on one data set: of two augmented views too if asked for; with
        `whole_pool`, few-shot episodes are drawn from all of a set without a test split.
        """
        seed, held_out, pool, views = self.config.train.seed, source.test is None, None, None
        seen = source.train if source.test is None else source.test
        (train,) = self.features(name, encoder, f"{source.slug}-train", source.train, [self.still])
        if held_out:
            pool = train if whole_pool else None
            train, test = train.hold_out(source.held_out(seed))
        else:
            (test,) = self.features(name, encoder, f"{source.slug}-test", seen, [self.still])
        if with_views:
            sample = subset(seen, view_sample(len(seen), seed).numpy())
            views = self.features(name, encoder, f"{source.slug}-views", sample, self.pair)
        return RowFeatures(train, test, views, pool, held_out, self.accelerator.device)

    def untrained(self, images: Images) -> nn.Module:
        """The encoder that training started from, with batch-norm statistics of the training images: with the
        initial 0 and 1 it would be a weaker baseline than it is."""
        backbone = untrained_encoder(self.config)
        backbone.to(self.accelerator.device).to(memory_format=torch.channels_last)
        with closing(self.loader(images, [self.still], sharded=False)) as loader:
            update_bn((batch.views[0] for batch in itertools.islice(loader, CALIBRATION_BATCHES)), backbone)
        return backbone


def cached(
    folder: Path, key: str, images: Images, extract: Callable[[Images], tuple[Features, ...]]
) -> tuple[Features, ...]:
    """The features of `images`, one `Features` per view, from `folder` where its key is `key`, else by
    `extract`, part by part.

    `extract` numbers the images it is given from 0. Every rank calls this; the first one writes.

    >>> import tempfile
    >>> images = pipelines.ArrayImages(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    >>> calls = []
    >>> def extract(part):
    ...     calls.append(len(part))
    ...     return (Features(torch.ones(len(part), 2), None, torch.arange(len(part))),)
    >>> folder = Path(tempfile.mkdtemp()) / "train"
    >>> [len(cached(folder, "key", images, extract)[0]) for _ in range(2)], calls
    ([3, 3], [3])
    """
    starts = range(0, len(images), PART_IMAGES)
    mark = folder / "key.json"
    if is_first_rank() and not (mark.is_file() and mark.read_text() == json.dumps(key)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(json.dumps(key))
    parts = []
    for start in with_progress(starts, f"features of {folder.name}", len(starts) > 1 and is_first_rank()):
        path = folder / f"{start:09d}.safetensors"
        part: dict[str, Tensor] | None = None
        with suppress(FileNotFoundError, SafetensorError):
            part = load_file(path)
        # Ranks extract together, so all of them must have read it.
        if not all(gathered(part is not None)) or part is None:
            chosen = np.arange(start, min(start + PART_IMAGES, len(images)))
            views = extract(images if len(starts) == 1 else subset(images, chosen))
            part = {f"view{number}": view.features for number, view in enumerate(views)}
            part |= {"index": views[0].index}
            part |= {} if views[0].labels is None else {"labels": views[0].labels}
            if is_first_rank():
                runs.write_bytes(path, save(part))
        parts.append(part | {"index": part["index"] + start})
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    index, labels = whole.pop("index"), whole.pop("labels", None)
    return tuple(Features(whole[view], labels, index) for view in sorted(whole))


def digest_of(
    encoder: nn.Module, images: Images, views: Sequence[pipelines.ViewSpec], *settings: object
) -> str:
    """What cached features depend on, as 64 hexadecimal digits: weights and buffers, images with their
    labels, views, and `settings`.

    An image file counts by its path, size and time of change; reading ImageNet to learn that nothing changed
    would take as long as extracting its features.
    """
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(digest_of_images(images).encode())
    digest.update(json.dumps([asdict(view) for view in views]).encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def digest_of_images(images: Images) -> str:
    """The images and labels of a data set as 64 hexadecimal digits.

    >>> images = pipelines.ArrayImages(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    >>> digest_of_images(images) == digest_of_images(subset(images, np.array([0, 1])))
    False
    """
    digest = hashlib.sha256(repr(images.classes).encode())
    for name in (*PER_IMAGE, "shards"):
        values = getattr(images, name, ())
        if isinstance(values, np.ndarray):
            digest.update(repr(values.shape).encode())
            digest.update(np.ascontiguousarray(values).data)
        elif name in ("paths", "shards"):
            for path in values:
                digest.update(f"{path}\0{_state_of(path)}\n".encode("utf-8", "surrogateescape"))
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
