"""From a data set to features: the loaders of evaluation, through the cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import update_bn

from fastgessl import pipelines
from fastgessl.build import view_specs
from fastgessl.config import Config
from fastgessl.distributed import world_size
from fastgessl.evaluate.cache import FeatureCache, digest_of, subset
from fastgessl.evaluate.classifier import ClassifierLoaders
from fastgessl.evaluate.features import Features, Pixels, extract_views
from fastgessl.evaluate.sources import Source
from fastgessl.evaluate.subject import untrained_encoder
from fastgessl.evaluate.suite import Extracted, hold_out_features, view_sample, wants_views
from fastgessl.pipelines.sources.images import Images

# Batches that estimate the untrained encoder's batch-norm statistics: 20 x 256 images fix a mean to about 1.5
# % of a standard deviation.
CALIBRATION_BATCHES = 20


@dataclass(frozen=True)
class Extraction:
    """Extracts features of data sets under one configuration; every rank calls every method."""

    config: Config
    accelerator: Accelerator
    cache: FeatureCache

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
        each epoch, whole batches only.

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

    def classifier_loaders(self) -> ClassifierLoaders:
        """Training with the recipe's crops and flips and nothing else, which is what supervised training of
        its backbones takes.
        """
        first = replace(self.pair[0], jitter_probability=0.0, grayscale_probability=0.0)
        light = replace(first, blur_probability=0.0, solarize_probability=0.0)
        return ClassifierLoaders(
            training=lambda images, size: self.loader(
                images, [light], sharded=False, batch_size=size, training=True
            ),
            still=lambda images: self.loader(images, [self.still], sharded=False),
        )

    def features(
        self,
        row: str,
        encoder: nn.Module | Literal["pixels"],
        name: str,
        images: Images,
        views: list[pipelines.ViewSpec],
    ) -> tuple[Features, ...]:
        """Features of `images`, one `Features` a view; kept under `row` and `name`, except raw pixels, which
        cost nothing to make again.
        """
        progress = self.accelerator.is_main_process
        net, device = (
            (Pixels(), torch.device("cpu")) if encoder == "pixels" else (encoder, self.accelerator.device)
        )
        cache = FeatureCache(None) if encoder == "pixels" else self.cache

        def extract(part: Images) -> tuple[Features, ...]:
            loader: Any = self.loader(part, views)
            try:
                return extract_views(net, loader, device, progress=progress)
            finally:
                loader.close()

        key = digest_of(net, images, views, self.config.train.seed) if cache.folder is not None else ""
        return cache.features(
            f"{row}-{name}".replace(" ", "-").replace("/", "-").replace(":", "-"), key, images, extract
        )

    def extracted(
        self, row: str, encoder: nn.Module | Literal["pixels"], source: Source, *, transfer: bool = False
    ) -> Extracted:
        """All that is measured of one encoder on one data set; of a `transfer` set no augmented views, and
        few-shot episodes from all of it where it has no test split."""
        seed = self.config.train.seed
        (train,) = self.features(row, encoder, f"{source.slug}-train", source.train, [self.still])
        everything = train
        if source.test is not None:
            (test,) = self.features(row, encoder, f"{source.slug}-test", source.test, [self.still])
        else:
            train, test = hold_out_features(train, source.held_out(seed))
        if transfer:
            return Extracted(train, test, None, pool=everything if source.test is None else None)
        views = None
        if wants_views(self.config.evaluate):
            seen = source.train if source.test is None else source.test
            sample = subset(seen, view_sample(len(seen), seed).numpy())
            views = self.features(row, encoder, f"{source.slug}-views", sample, self.pair)
        return Extracted(train, test, views)

    def untrained(self, images: Images) -> nn.Module:
        """The encoder that training started from, with batch-norm statistics of the training images: with the
        initial 0 and 1 it would be a weaker baseline than it is."""
        backbone = (
            untrained_encoder(self.config).to(self.accelerator.device).to(memory_format=torch.channels_last)
        )
        loader = self.loader(images, [self.still], sharded=False)
        update_bn((batch.views[0] for batch in itertools.islice(loader, CALIBRATION_BATCHES)), backbone)
        loader.close()
        return backbone
