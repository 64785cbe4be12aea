"""What an evaluation task is. A file in this folder that registers one is all that a new task takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.features import RowFeatures
from fastgessl.evaluate.sources import DataFacts, Source
from fastgessl.evaluate.tables import Column, Table


@dataclass(frozen=True)
class Work:
    """All that an evaluation has in hand."""

    rows: Mapping[str, nn.Module]
    """The encoders, by the names of their rows."""
    features: Mapping[str, Mapping[str, RowFeatures]]
    """Data set -> row -> features."""
    sources: Sequence[Source]
    """The data sets; the first is the run's own."""
    extractor: Extractor
    folder: Path
    """The run's, or the one for what is measured of a model that is no run."""

    @property
    def settings(self) -> EvaluateConfig:
        return self.extractor.config.evaluate

    @property
    def seed(self) -> int:
        return self.extractor.config.train.seed


@dataclass(frozen=True)
class EvaluationTask:
    """A measurement with a name: of frozen features, one encoder at a time, or of all that there is."""

    name: str
    """As evaluate.tasks and evaluation.json have it."""
    measure: Callable[..., Any]
    """(features of one encoder, settings, seed) -> numbers, strings, lists and dictionaries of them. With
    `tables`: (`Work`) -> what is measured of all encoders; it may train, and so runs on one process."""
    columns: Callable[[EvaluateConfig], list[Column]] = lambda settings: []
    """The columns that what is measured has in the table of frozen features."""
    tables: Callable[[Any], list[Table]] | None = None
    """The tables of a task that needs more than features, from what it has measured as JSON has it."""
    place: tuple[int, int] = (9, 0)
    """Which of the tables it is shown in, and where in it."""
    default: bool = False
    """Whether it runs where no task is named."""
    transfer: bool = False
    """Whether it is measured on the data sets of evaluate.transfer too."""
    needs_labels: bool = True
    needs_views: bool = False
    needs_checkpoints: bool = False
    obstacle: Callable[[DataFacts, EvaluateConfig], str] = lambda facts, settings: ""
    """Why the data does not allow it, beyond labels and views that are missing; empty if it does."""
    seconds: Callable[[DataFacts, EvaluateConfig], float] = lambda facts, settings: 0.0
    """About how long it takes per encoder; what takes over ten minutes waits to be asked for by name."""


TASKS: dict[str, EvaluationTask] = {}
"""Every registered task by name, in the order of their places."""


def register(task: EvaluationTask) -> None:
    """Make a task known by its name. Raises ValueError if the name is taken."""
    if task.name in TASKS:
        raise ValueError(f"task '{task.name}' is registered already. Choose another name.")
    known = sorted([*TASKS.values(), task], key=lambda one: (one.place, one.name))
    TASKS.clear()
    TASKS.update({one.name: one for one in known})
