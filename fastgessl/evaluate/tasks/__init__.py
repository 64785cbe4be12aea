"""Evaluation tasks: a file each, registered by name. Every module of this folder is imported, so that a new
file is enough.
"""

import difflib
from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate.sources import DataFacts, unusable_labels
from fastgessl.evaluate.tasks.base import TASKS, EvaluationTask, Work, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "TASKS",
    "EvaluationTask",
    "Work",
    "named_tasks",
    "plan_tasks",
    "register",
    "wanted_tasks",
]

# What nobody asked for by name must not hold up the end of a run.
SECONDS_UNASKED = 600.0


def named_tasks(tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks that are meant, `all` spelt out. Raises UsageError, with the nearest name and all known ones,
    for one that does not exist.

    Cheap: call it before training.

    >>> named_tasks(["knn", "knn"])
    ('knn',)
    """
    meant: dict[str, None] = {}
    for task in tasks:
        if task != "all" and task not in TASKS:
            nearest = difflib.get_close_matches(task, TASKS, n=1)
            hint = f" Perhaps you meant {nearest[0]}." if nearest else ""
            raise UsageError(
                f"evaluate.tasks names an unknown task '{task}'.{hint} Known tasks: {', '.join(TASKS)}; all "
                "means every one."
            )
        meant |= dict.fromkeys(TASKS if task == "all" else [task])
    return tuple(meant)


def wanted_tasks(settings: EvaluateConfig, *, transfer: bool = False) -> list[EvaluationTask]:
    """The tasks that are asked for; those that run by themselves where none is. For a `transfer` set, those
    of its features that say something of transfer.
    """
    names = named_tasks(settings.tasks) or [name for name, task in TASKS.items() if task.default]
    tasks = [TASKS[name] for name in names]
    return [task for task in tasks if task.transfer and not task.tables] if transfer else tasks


def plan_tasks(
    settings: EvaluateConfig, facts: DataFacts, *, transfer: bool = False
) -> tuple[list[EvaluationTask], dict[str, str]]:
    """Which tasks run, and which the data does not allow with the reason.

    Tasks named in `settings.tasks` must be possible, else UsageError; with none named, or `all`, those that
    are possible run, and with none named, those that take no longer than ten minutes.

    >>> import torch
    >>> tasks, skipped = plan_tasks(EvaluateConfig(), DataFacts(torch.tensor([0, 1]), None))
    >>> tasks, skipped["geometry"]
    ([], 'there is no loader of augmented views.')
    """
    wanted = wanted_tasks(settings, transfer=transfer)
    obstacles = {task.name: _obstacle(task, facts, settings) for task in wanted}
    skipped = {name: obstacle for name, obstacle in obstacles.items() if obstacle}
    for name in settings.tasks if "all" not in settings.tasks else ():
        if name in skipped:
            raise UsageError(f"Task {name}: {skipped[name]}")
    return [task for task in wanted if task.name not in skipped], skipped


def _obstacle(task: EvaluationTask, facts: DataFacts, settings: EvaluateConfig) -> str:
    if task.needs_views and not facts.views:
        return "there is no loader of augmented views."
    if not task.needs_labels:
        return ""
    obstacle = unusable_labels(facts.train, facts.test) or task.obstacle(facts, settings)
    if obstacle or settings.tasks or facts.train is None:
        return obstacle
    seconds = task.seconds(facts, settings)
    if seconds <= SECONDS_UNASKED:
        return ""
    size = f"{len(facts.train)} images, {len(facts.train.unique())} classes and {facts.width} features"
    return f"{size} would take up to {seconds / 3600:.1f} h. Ask for it: --evaluate.tasks {task.name}."
