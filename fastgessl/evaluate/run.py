"""Evaluation of a run: k-NN, effective rank and an online probe along the way, every task at the end or by
`fastgessl evaluate`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor, nn

from fastgessl import runs
from fastgessl.config import Config, UsageError
from fastgessl.distributed import build_accelerator, continues_alone
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.features import Pixels, RowFeatures, on_first_rank
from fastgessl.evaluate.measure import as_json, measure, monitor, tables_of
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.sources import (
    DataFacts,
    Source,
    labels_of,
    open_source,
    open_transfer,
    require_labels,
)
from fastgessl.evaluate.subject import Subject
from fastgessl.evaluate.tasks import EvaluationTask, Work, plan_tasks, wanted_tasks
from fastgessl.methods import METHODS, Outputs
from fastgessl.models import build_backbone, feature_width
from fastgessl.pipelines.sources.images import Images
from fastgessl.runs import checkpoint


class RunEvaluation:
    """What is measured of one run. Built before training starts, so that a task that cannot be done is
    refused then.
    """

    def __init__(
        self, config: Config, own: Source, accelerator: Accelerator, cache: Path | None = None
    ) -> None:
        self._config = config
        self._accelerator = accelerator
        self._extractor = Extractor(config, accelerator, cache)
        self._own = own
        self._sources = [own, *_transfer_sources(config)]
        learned, judged = (labels_of(part) for part in own.splits(config.train.seed))
        self._tasks, _ = plan_tasks(config.evaluate, DataFacts(learned, judged, views=True))
        for source in self._sources[1:]:
            _require_measurable(source, config, self._tasks)
        self.probe: OnlineProbe | None = None
        labels = labels_of(own.train)
        if config.evaluate.every_epochs and labels is not None:
            width = feature_width(build_backbone(config.model))
            self.probe = OnlineProbe(width, int(labels.max()) + 1).to(accelerator.device)
        # A method that reads labels never gets the images that are held out, and numbers the others again:
        # see `trained_on`.
        held_out = own.held_out(config.train.seed)
        self._unlearned = held_out[: 0 if _reads_labels(config) else None].to(accelerator.device)

    def observe(self, outputs: Outputs, labels: Tensor | None, index: Tensor) -> None:
        """Let the online probe, if there is one, learn from the first view's features (V, N, F) of a training
        step on the images `index` (N,): from those that it will not be judged on."""
        if self.probe is not None and labels is not None:
            self.probe.update(outputs.features[0], labels, ~torch.isin(index, self._unlearned))

    def during_training(self, backbone: nn.Module) -> dict[str, float]:
        """Effective rank, and with labels k-NN accuracy and the online probe's. Every rank calls it."""
        _adopt_first_ranks_statistics(backbone)
        # Training's own bar is up.
        features = replace(self._extractor, quiet=True).row("", backbone, self._own, with_views=False)
        return on_first_rank(lambda: monitor(features, self._config.evaluate, self.probe))

    def finish(
        self, backbone: nn.Module, run: Path, facts: Mapping[str, Any], name: str = "this run"
    ) -> None:
        """Measure raw pixels, the untrained encoder and this one; print the tables, write evaluation.json and
        summary.json.

        The ranks share the extraction of features; then the process group ends, and rank 0 measures alone.
        """
        _adopt_first_ranks_statistics(backbone)
        rows = {
            "raw pixels": Pixels(),
            "untrained encoder": self._extractor.untrained(self._own.train),
            name: backbone,
        }
        settings, extractor = self._config.evaluate, self._extractor
        with_views = any(task.needs_views for task in wanted_tasks(settings))
        features: dict[str, dict[str, RowFeatures]] = {}
        for source in self._sources:
            # Of a transfer set no augmented views, and few-shot episodes from all of it where it has no test
            # split.
            own = source is self._own
            features[source.name] = {
                row: extractor.row(row, encoder, source, with_views=with_views and own, whole_pool=not own)
                for row, encoder in rows.items()
            }
        if not continues_alone(self._accelerator):
            return
        found = {}
        for source in self._sources:
            with _named(source):
                found[source.name] = measure(
                    features[source.name],
                    settings,
                    self._config.train.seed,
                    transfer=source is not self._own,
                    progress=extractor.progress,
                )
        measured = found.pop(self._own.name).to_json() | {"data": self._own.name}
        if found:
            measured["transfer"] = {data: each.to_json() for data, each in found.items()}
        work = Work(rows, features, self._sources, extractor, run)
        for task in self._tasks:
            asked = task.name in settings.tasks or not task.needs_checkpoints
            if task.tables and (asked or checkpoint.complete(run)):
                measured[task.name] = as_json(task.measure(work))
        console = Console()
        for table in tables_of(measured):
            console.print(table.terminal())
        runs.write_json(run / "evaluation.json", measured)
        named = {"recipe": self._config.recipe, "run": run.name}
        runs.write_json(run / "summary.json", {**named, **facts, **named, "evaluation": measured})
        print(f"run folder: {run}", flush=True)


def trained_on(config: Config, source: Source) -> Images:
    """The images that training may see: all of them, but for a method that reads labels those that the run
    will be judged on.

    Where there is a test split, these are all of them too. UsageError for a method that does not exist is
    left to whoever builds it.
    """
    return source.splits(config.train.seed)[0] if _reads_labels(config) else source.train


def evaluate_subject(subject: Subject) -> None:
    """`fastgessl evaluate`: measure an encoder, its features kept in its folder."""
    config = subject.config
    accelerator = build_accelerator(config, subject.folder)
    source = open_source(config.data.name, config.data.root)
    encoder = subject.encoder.to(accelerator.device).to(memory_format=torch.channels_last)
    # What training wrote beside the evaluation stays.
    summary = subject.folder / "summary.json"
    facts = json.loads(summary.read_text()) if summary.is_file() else {}
    evaluation = RunEvaluation(config, source, accelerator, subject.cache)
    evaluation.finish(encoder, subject.folder, facts, subject.name)


def _reads_labels(config: Config) -> bool:
    method = METHODS.get(config.method.name)
    return method is not None and method.needs_labels


def _transfer_sources(config: Config) -> list[Source]:
    """The data sets of evaluate.transfer. UsageError for two of one name, which no table could tell apart."""
    sources = [open_transfer(specification) for specification in config.evaluate.transfer]
    names = [config.data.name, *(source.name for source in sources)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"evaluate.transfer: two data sets are called '{twice}', the run's own included. Leave one out "
            "or rename its file."
        )
    return sources


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Inside, a UsageError names the data set."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source.name}: {error}") from None


def _require_measurable(source: Source, config: Config, tasks: Iterable[EvaluationTask]) -> None:
    """UsageError for a task that a data set to transfer to does not allow."""
    train, test = (labels_of(part) for part in source.splits(config.train.seed))
    pool = labels_of(source.train) if source.test is None else None
    with _named(source):
        plan_tasks(config.evaluate, DataFacts(train, test, pool), transfer=True)
        for task in tasks:
            if task.tables and task.transfer:
                require_labels(task.name, train, test)


def _adopt_first_ranks_statistics(backbone: nn.Module) -> None:
    """Local batch norm leaves each rank with running statistics of its own; the encoder that is kept and
    measured is rank 0's.
    """
    for buffer in backbone.buffers():
        broadcast(buffer)
