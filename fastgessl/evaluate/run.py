"""Evaluation of a run: k-NN, effective rank and an online probe along the way, every task at the end or by
`fastgessl evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor, nn

from fastgessl import pipelines, runs
from fastgessl.config import Config, EvaluateConfig, UsageError
from fastgessl.distributed import build_accelerator, continues_alone
from fastgessl.evaluate.cache import FeatureCache
from fastgessl.evaluate.extraction import Extraction
from fastgessl.evaluate.further import Rows, measure_further, require_one_process
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.report import Report, plain
from fastgessl.evaluate.sources import Source, open_transfer
from fastgessl.evaluate.splits import require_labels
from fastgessl.evaluate.subject import Subject
from fastgessl.evaluate.suite import EvaluationData, Extracted, held_out_test, measure, monitor
from fastgessl.evaluate.tables import tables
from fastgessl.evaluate.tasks import DEFAULT_TASKS, TRANSFER_TASKS, named_tasks, plan_tasks
from fastgessl.methods import METHODS, Outputs
from fastgessl.models import build_backbone, feature_width
from fastgessl.pipelines.sources.images import Images


class RunEvaluation:
    """What is measured of one run. Built before training starts, so that a task that cannot be done is
    refused then.
    """

    def __init__(
        self, config: Config, images: Images, accelerator: Accelerator, cache: FeatureCache | None = None
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._source = Source(
            config.data.name, images, pipelines.open_images(config.data.name, config.data.root, "test")
        )
        labels = _labels(images)
        self._held_out = self._source.held_out(config.train.seed)
        self._tasks, _ = plan_tasks(
            config.evaluate, *_judged_labels(self._source, config.train.seed), has_views=True
        )
        require_one_process(self._tasks, accelerator.num_processes)
        self._transfer = _transfer_sources(config)
        for source in self._transfer:
            _require_measurable(source, config, self._tasks)
        self._extraction = Extraction(config, accelerator, cache or FeatureCache(None))
        self.probe: OnlineProbe | None = None
        if config.evaluate.every_epochs and labels is not None:
            width = feature_width(build_backbone(config.model))
            self.probe = OnlineProbe(width, int(labels.max()) + 1).to(accelerator.device)
        # A method that reads labels never gets the images that are held out, and numbers the others anew: see
        # `trained_on`.
        unlearned = self._held_out[:0] if _reads_labels(config) else self._held_out
        self._unlearned = unlearned.to(accelerator.device)

    def observe(self, outputs: Outputs, labels: Tensor | None, index: Tensor) -> None:
        """Let the online probe, if there is one, learn from the first view's features (V, N, F) of a training
        step on the images `index` (N,): from those that it will not be judged on."""
        if self.probe is not None and labels is not None:
            self.probe.update(outputs.features[0], labels, ~torch.isin(index, self._unlearned))

    def during_training(self, backbone: nn.Module) -> dict[str, float]:
        """Effective rank, and with labels k-NN accuracy and the online probe's. Every rank calls it."""
        _adopt_first_ranks_statistics(backbone)
        still, test = [self._extraction.still], self._source.test
        loaders = [
            self._extraction.loader(images, still)
            for images in (self._source.train, test)
            if images is not None
        ]
        try:
            device, seed = self._accelerator.device, self._config.train.seed
            data = EvaluationData(loaders[0], None if test is None else loaders[1], held_out=self._held_out)
            return monitor(backbone, data, self._config.evaluate, seed, device, probe=self.probe)
        finally:
            for loader in loaders:
                loader.close()

    def finish(
        self, backbone: nn.Module, run: Path, facts: Mapping[str, Any], name: str = "this run"
    ) -> None:
        """Measure raw pixels, the untrained encoder and this one; print the tables, write evaluation.json and
        summary.json.

        The ranks share the extraction of features; then the process group ends, and rank 0 measures alone.
        """
        _adopt_first_ranks_statistics(backbone)
        rows: Rows = {
            "raw pixels": "pixels",
            "untrained encoder": self._extraction.untrained(self._source.train),
            name: backbone,
        }
        sources = [self._source, *self._transfer]
        features = {
            source.name: {
                row: self._extraction.extracted(row, encoder, source, transfer=number > 0)
                for row, encoder in rows.items()
            }
            for number, source in enumerate(sources)
        }
        if not continues_alone(self._accelerator):
            return
        reports = [
            self._report(source, features[source.name], transfer=number > 0)
            for number, source in enumerate(sources)
        ]
        further = measure_further(self._tasks, rows, features, sources, self._extraction, run)
        self._show([report for report in reports if report.tasks], further)
        transfer = {
            source.name: report.to_json() for source, report in zip(sources[1:], reports[1:], strict=True)
        }
        measured = reports[0].to_json() | ({"transfer": transfer} if transfer else {}) | plain(further)
        runs.write_json(run / "evaluation.json", measured)
        runs.write_json(
            run / "summary.json",
            {"recipe": self._config.recipe, "run": run.name, **facts, "evaluation": measured},
        )
        print(f"run folder: {run}", flush=True)

    def _report(self, source: Source, features: Mapping[str, Extracted], *, transfer: bool) -> Report:
        """The feature tasks on one data set; on a further one those that say something of transfer."""
        settings, progress = self._config.evaluate, self._accelerator.is_main_process
        lenient = transfer and _lenient(settings)
        if transfer:
            settings = _transfer_settings(settings)
            if not settings.tasks:
                return Report({}, (), {}, {}, settings, source.name)
        try:
            report = measure(
                features, source.test is None, settings, self._config.train.seed, progress, lenient
            )
        except UsageError as error:
            raise UsageError(f"{source.name}: {error}") from None
        return replace(report, data=source.name)

    def _show(self, reports: list[Report], further: Mapping[str, Any]) -> None:
        console = Console()
        for table in [*(report.table() for report in reports), *tables(further)]:
            console.print(table)


def trained_on(config: Config, images: Images) -> Images:
    """The images that training may see: all of them, but for a method that reads labels those that the run
    will be judged on.

    Where there is a test split, these are all of them too. UsageError for a method that does not exist is
    left to whoever builds it.
    """
    if not _reads_labels(config):
        return images
    test = pipelines.open_images(config.data.name, config.data.root, "test")
    return images if test is not None else Source(config.data.name, images, None).splits(config.train.seed)[0]


def _reads_labels(config: Config) -> bool:
    method = METHODS.get(config.method.name)
    return method is not None and method.needs_labels


def _judged_labels(source: Source, seed: int) -> tuple[Tensor | None, Tensor | None]:
    """The labels that probes will learn from and be judged by."""
    labels = _labels(source.train)
    if source.test is not None or labels is None:
        return labels, None if source.test is None else _labels(source.test)
    kept, held = held_out_test(labels, seed)
    return labels[kept], labels[held]


def evaluate_subject(subject: Subject) -> None:
    """`fastgessl evaluate`: measure an encoder, its features kept in its folder."""
    config = subject.config
    accelerator = build_accelerator(config, subject.folder)
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None  # only a test split can be absent
    encoder = subject.encoder.to(accelerator.device).to(memory_format=torch.channels_last)
    cache = FeatureCache(subject.folder / "features" if config.evaluate.cache else None)
    evaluation = RunEvaluation(config, images, accelerator, cache)
    evaluation.finish(encoder, subject.folder, _earlier_facts(subject.folder), subject.name)


def _transfer_sources(config: Config) -> list[Source]:
    """The data sets of evaluate.transfer. UsageError for two of one name, which a table could not tell apart."""
    sources = [open_transfer(specification) for specification in config.evaluate.transfer]
    names = [config.data.name, *(source.name for source in sources)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"evaluate.transfer: two data sets are called '{twice}', the run's own included. Leave one out "
            "or rename its file."
        )
    return sources


def _transfer_settings(settings: EvaluateConfig) -> EvaluateConfig:
    """What is asked of a data set to transfer to: of the tasks that are meant those that say something of
    transfer.
    """
    wanted = named_tasks(settings.tasks) or DEFAULT_TASKS
    return settings.model_copy(update={"tasks": tuple(task for task in wanted if task in TRANSFER_TASKS)})


def _lenient(settings: EvaluateConfig) -> bool:
    """Whether a data set to transfer to may miss tasks: those that nobody asked for by name."""
    return not settings.tasks or "all" in settings.tasks


def _require_measurable(source: Source, config: Config, tasks: tuple[str, ...]) -> None:
    """UsageError, naming the data set, for a task that a data set to transfer to does not allow."""
    train, test = _judged_labels(source, config.train.seed)
    pool = _labels(source.train) if source.test is None else None
    settings = _transfer_settings(config.evaluate)
    try:
        if settings.tasks:
            plan_tasks(settings, train, test, has_views=False, pool=pool, lenient=_lenient(config.evaluate))
        if "universality" in tasks:
            require_labels("universality", train, test)
    except UsageError as error:
        raise UsageError(f"{source.name}: {error}") from None


def _earlier_facts(folder: Path) -> dict[str, Any]:
    """What training wrote into summary.json beside the evaluation."""
    summary = folder / "summary.json"
    written = json.loads(summary.read_text()) if summary.is_file() else {}
    return {key: value for key, value in written.items() if key not in ("recipe", "run", "evaluation")}


def _labels(images: Images) -> Tensor | None:
    return None if images.labels is None else torch.from_numpy(images.labels)


def _adopt_first_ranks_statistics(backbone: nn.Module) -> None:
    """Local batch norm leaves each rank with running statistics of its own; the encoder that is kept and
    measured is rank 0's.
    """
    for buffer in backbone.buffers():
        broadcast(buffer)
