"""The tasks that need the encoder and the images themselves: fine-tuning, universality over data sets,
learning universality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastgessl.config import UsageError
from fastgessl.evaluate.extraction import Extraction
from fastgessl.evaluate.finetune import finetune
from fastgessl.evaluate.learning import along_checkpoints
from fastgessl.evaluate.progress import shown
from fastgessl.evaluate.sources import Source
from fastgessl.evaluate.suite import Extracted
from fastgessl.evaluate.supervised import task_model
from fastgessl.evaluate.tasks import IMAGE_TASKS
from fastgessl.evaluate.universality import TaskSigma, choose_probe, summed, task_sigma
from fastgessl.runs import checkpoint

Rows = Mapping[str, nn.Module | Literal["pixels"]]
Features = Mapping[str, Mapping[str, Extracted]]
"""Data set -> row -> features; the first data set is the run's own."""


def require_one_process(tasks: tuple[str, ...], processes: int) -> None:
    """Raises UsageError for a task that trains, where there are several processes: it would be trained on
    each.

    >>> require_one_process(("linear", "knn"), processes=8)
    """
    training = [task for task in IMAGE_TASKS if task in tasks]
    if training and processes > 1:
        raise UsageError(
            f"Task {training[0]} trains on one process. Start `fastgessl evaluate` without a launcher of "
            "several."
        )


def measure_further(
    tasks: tuple[str, ...],
    rows: Rows,
    features: Features,
    sources: list[Source],
    extraction: Extraction,
    folder: Path,
) -> dict[str, Any]:
    """Task -> row -> what was measured, for the tasks of `IMAGE_TASKS` among `tasks`.

    What has no checkpoints has no learning universality; asked for by name that is a UsageError, among `all`
    it is left out.
    """
    wanted = [task for task in IMAGE_TASKS if task in tasks]
    if not checkpoint.complete(folder) and "learning" not in extraction.config.evaluate.tasks:
        wanted = [task for task in wanted if task != "learning"]
    measured: dict[str, Any] = {}
    if "finetune" in wanted:
        measured["finetune"] = _finetune(rows, sources[0], extraction)
    if "universality" in wanted:
        measured["universality"] = _universality(features, sources, extraction, folder)
    if "learning" in wanted:
        measured["learning"] = [asdict(point) for point in along_checkpoints(folder, sources[0], extraction)]
    return measured


def _finetune(rows: Rows, source: Source, extraction: Extraction) -> dict[str, Any]:
    """Row -> one result a share of the labels; raw pixels have no weights to fine-tune."""
    config, train_and_test = extraction.config, source.splits(extraction.config.train.seed)
    encoders = {name: encoder for name, encoder in rows.items() if isinstance(encoder, nn.Module)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    runs = [(name, share) for name in encoders for share in config.evaluate.label_fractions]
    for name, share in shown(runs, "fine-tuning", extraction.accelerator.is_main_process):
        loaders, device = extraction.classifier_loaders(), extraction.accelerator.device
        result = finetune(
            encoders[name], *train_and_test, share, config.evaluate, loaders, device, config.train.seed
        )
        found[name].append(asdict(result))
    return found


def _universality(
    features: Features, sources: list[Source], extraction: Extraction, folder: Path
) -> dict[str, Any]:
    """Row -> σ of each task with the sums; the supervised models, where they are the target, are trained
    first.
    """
    settings, seed = extraction.config.evaluate, extraction.config.train.seed
    models = {}
    if settings.sigma_against == "supervised":
        models = {source.name: task_model(source, extraction, folder / "task_models") for source in sources}
    sigmas: dict[str, list[TaskSigma]] = {}
    work = [(number, source, row) for number, source in enumerate(sources) for row in features[source.name]]
    for number, source, row in shown(work, "universality", extraction.accelerator.is_main_process):
        part = features[source.name][row]
        part.test.require_finite(f"Row '{row}'")
        kind, probe = choose_probe(
            part.train, hidden=settings.mlp_hidden, epochs=settings.probe_epochs, seed=seed
        )
        own = models.get(source.name)
        tasks = sigmas.setdefault(row, [])
        if number == 0:
            tasks.append(
                task_sigma(
                    source.name, "discriminability", part.train, probe, kind, own.train if own else None
                )
            )
        group = "transferability" if number else "generalisation"
        tasks.append(task_sigma(source.name, group, part.test, probe, kind, own.test if own else None))
    found = {row: asdict(summed(tasks)) for row, tasks in sigmas.items()}
    accuracies = {name: model.test_accuracy for name, model in models.items()}
    return {"rows": found, "target": settings.sigma_against, "task_model_accuracy": accuracies}
