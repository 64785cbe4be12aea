"""Evaluation of a run: k-NN and an online probe along the way, every task at the end or by `fastgessl evaluate`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastgessl import pipelines, runs
from fastgessl.build import build_accelerator, view_specs
from fastgessl.config import Config, UsageError
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.suite import EvaluationData, evaluate, held_out_test, monitor, plan_tasks
from fastgessl.methods import Outputs
from fastgessl.models import build_backbone, feature_width
from fastgessl.pipelines.images import Images

# Batches that estimate the untrained encoder's batch-norm statistics: 20 x 256 images fix a mean to about 1.5 % of a standard deviation.
_CALIBRATION_BATCHES = 20


class RunEvaluation:
    """What is measured of one run. Built before training starts, so that a task that cannot be done is refused then."""

    def __init__(self, config: Config, images: Images, accelerator: Accelerator) -> None:
        self._config, self._images, self._accelerator = config, images, accelerator
        self._test = pipelines.open_images(config.data.name, config.data.root, "test")
        labels = _labels(images)
        plan_tasks(config.evaluate, *self._judged_labels(labels), has_views=True)
        self.probe: OnlineProbe | None = None
        if config.evaluate.every_epochs and labels is not None:
            width = feature_width(build_backbone(config.model))
            self.probe = OnlineProbe(width, int(labels.max()) + 1).to(accelerator.device)

    def _judged_labels(self, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The labels that probes will learn from and be judged by."""
        if self._test is not None or labels is None:
            return labels, None if self._test is None else _labels(self._test)
        kept, held = held_out_test(labels, self._config.train.seed)
        return labels[kept], labels[held]

    def observe(self, outputs: Outputs, labels: Tensor | None) -> None:
        """Let the online probe, if there is one, learn from the first view's features of a training step."""
        if self.probe is not None and labels is not None:
            self.probe.update(outputs.features[0], labels)

    def during_training(self, backbone: nn.Module) -> dict[str, float]:
        """k-NN accuracy and the online probe's; empty without labels. Every rank calls it."""
        _adopt_first_ranks_statistics(backbone)
        device = self._accelerator.device
        return monitor(backbone, self._data(), self._config.evaluate, self._config.train.seed, device, probe=self.probe)

    def finish(self, backbone: nn.Module, run: Path, facts: Mapping[str, Any]) -> None:
        """Measure raw pixels, the untrained encoder and this one; print the table, write evaluation.json and summary.json."""
        _adopt_first_ranks_statistics(backbone)
        rows: dict[str, Any] = {"raw pixels": "pixels", "untrained encoder": self._untrained(), "this run": backbone}
        main = self._accelerator.is_main_process
        report = evaluate(rows, self._data(), self._config.evaluate, self._config.train.seed, self._accelerator.device, progress=main)
        if main:
            measured = report.to_json()
            runs.write_json(run / "evaluation.json", measured)
            runs.write_json(run / "summary.json", {"recipe": self._config.recipe, "run": run.name, **facts, "evaluation": measured})
            Console().print(report.table())
            print(f"run folder: {run}", flush=True)

    def _data(self) -> EvaluationData:
        config = self._config
        still = [pipelines.evaluation_view(config.views.size, mean=config.views.mean, std=config.views.std)]
        augmented = [replace(spec, repeat=1) for spec in view_specs(config) for _ in range(spec.repeat)][:2]
        return EvaluationData(
            train=self._loader(self._images, still),
            test=None if self._test is None else self._loader(self._test, still),
            views=self._loader(self._images if self._test is None else self._test, augmented),
        )

    def _loader(self, images: Images, views: list[pipelines.ViewSpec], *, sharded: bool = True) -> pipelines.Loader:
        world_size = self._accelerator.num_processes if sharded else 1
        return pipelines.build(
            images,
            views,
            batch_size=self._config.evaluate.batch_size * world_size,
            engine=self._config.data.engine,
            device=self._accelerator.device,
            rank=self._accelerator.process_index if sharded else 0,
            world_size=world_size,
            seed=self._config.train.seed,
            training=False,
            workers=self._config.data.workers,
            resident_limit=self._config.data.resident_limit,
        )

    def _untrained(self) -> nn.Module:
        """The encoder that training started from, with batch-norm statistics of the training images: with the initial 0 and 1 it would
        be a weaker baseline than it is (digits, mean of three seeds, ten labels a class: 62.9 % against 65.1 %)."""
        backbone = untrained_encoder(self._config).to(self._accelerator.device).to(memory_format=torch.channels_last)
        still = pipelines.evaluation_view(self._config.views.size, mean=self._config.views.mean, std=self._config.views.std)
        batches = itertools.islice(self._loader(self._images, [still], sharded=False), _CALIBRATION_BATCHES)
        update_bn((batch.views[0] for batch in batches), backbone)
        return backbone


def untrained_encoder(config: Config) -> nn.Module:
    """The backbone with the weights that `config` starts training from: they depend on its model and seed alone."""
    set_seed(config.train.seed)
    return build_backbone(config.model)


def evaluate_run(config: Config, folder: str | Path) -> None:
    """`fastgessl evaluate`: measure the exported encoder of a finished run. UsageError if there is none or it does not fit the model."""
    run = Path(folder)
    weights = run / "encoder.safetensors"
    if not weights.is_file():
        raise UsageError(
            f"run '{run}' has no encoder.safetensors, so it has not been trained to its end. "
            f"Finish it: fastgessl train {run / 'config.yaml'} --train.run_dir {run} --train.resume auto"
        )
    backbone = untrained_encoder(config)
    try:
        backbone.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"'{weights}' does not hold the weights of model.name {config.model.name}: {reason}") from None
    accelerator = build_accelerator(config, run)
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None  # only a test split can be absent
    backbone.to(accelerator.device).to(memory_format=torch.channels_last)
    RunEvaluation(config, images, accelerator).finish(backbone, run, facts={})


def _labels(images: Images) -> Tensor | None:
    return None if images.labels is None else torch.from_numpy(images.labels)


def _adopt_first_ranks_statistics(backbone: nn.Module) -> None:
    """Local batch norm leaves each rank with running statistics of its own; the encoder that is kept and measured is rank 0's."""
    for buffer in backbone.buffers():
        broadcast(buffer)
