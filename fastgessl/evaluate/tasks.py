"""Which tasks there are, and which of them the data allows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate.few_shot import too_few_for_episodes
from fastgessl.evaluate.knn import PUBLISHED, too_few_for_protocols, too_few_neighbours
from fastgessl.evaluate.splits import too_few_labels, unusable_labels

# What runs when no task is named: at the end of every training, in seconds on small data.
DEFAULT_TASKS = ("linear", "few_labels", "knn", "sigma", "geometry")
FEATURE_TASKS = (
    *DEFAULT_TASKS,
    "linear_sgd",
    "mlp",
    "knn_protocols",
    "label_fractions",
    "few_shot",
    "conditions",
)
# These need the encoder and the images themselves, not only their features.
IMAGE_TASKS = ("finetune", "universality", "learning")
TASKS = (*FEATURE_TASKS, *IMAGE_TASKS)
# What other data sets are measured by.
TRANSFER_TASKS = ("linear", "linear_sgd", "mlp", "knn", "knn_protocols", "few_shot")
# What nobody asked for by name must not hold up the end of a run, nor outlast the ten minutes that NCCL lets
# the other ranks wait.
SECONDS_UNASKED = 600.0
# Measured: 20 s for a probe on 50,000 × 512 × 10 with its search, a fit alone a quarter; 13 s for k-NN of
# 10,000 against 50,000 × 512.
SECONDS_PER_PRODUCT = {"linear": 8e-8, "sigma": 8e-8, "few_labels": 2e-8, "knn": 5e-11}


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


def require_known_tasks(tasks: Iterable[str]) -> None:
    """Raises UsageError as `named_tasks` does."""
    named_tasks(tasks)


def plan_tasks(
    settings: EvaluateConfig,
    train: Tensor | None,
    test: Tensor | None,
    has_views: bool,
    width: int = 0,
    pool: Tensor | None = None,
    lenient: bool = False,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which tasks run, and which the data does not allow with the reason, from the labels of both splits
    (N,), (M,) or None, and those of the few-shot `pool`, where it is not the test split.

    Tasks named in `settings.tasks` must be possible, else UsageError, unless `lenient`; with none named, or
    `all`, those that are possible run, and with none named, for features of `width` columns, those that take
    no longer than ten minutes.

    >>> import torch
    >>> plan_tasks(EvaluateConfig(tasks=("linear",)), torch.tensor([0, 1]), torch.tensor([1]), has_views=False)
    (('linear',), {})
    """
    wanted = named_tasks(settings.tasks) or DEFAULT_TASKS
    obstacles = {
        task: _obstacle(task, settings, train, test, has_views, test if pool is None else pool)
        for task in wanted
    }
    if not settings.tasks and train is not None and test is not None:
        obstacles = {
            task: obstacle or _too_slow(task, settings, train, test, width)
            for task, obstacle in obstacles.items()
        }
    skipped = {task: obstacle for task, obstacle in obstacles.items() if obstacle}
    by_name = [task for task in settings.tasks if task in skipped]
    if by_name and not lenient:
        raise UsageError(f"Task {by_name[0]}: {skipped[by_name[0]]}")
    return tuple(task for task in obstacles if task not in skipped), skipped


def _obstacle(
    task: str,
    settings: EvaluateConfig,
    train: Tensor | None,
    test: Tensor | None,
    has_views: bool,
    pool: Tensor | None,
) -> str:
    if task in ("geometry", "conditions"):
        return "" if has_views else "there is no loader of augmented views."
    if task == "learning":
        return ""
    obstacle = unusable_labels(train, test)
    if obstacle or train is None or test is None:
        return obstacle
    match task:
        case "few_labels":
            return too_few_labels(train, settings.labels_per_class)
        case "knn":
            return too_few_neighbours(len(train), settings.knn_k)
        case "knn_protocols":
            return too_few_for_protocols(len(train), PUBLISHED)
        case "few_shot":
            return too_few_for_episodes(pool, settings.ways, max(settings.shots) + settings.queries)
    return ""


def _too_slow(task: str, settings: EvaluateConfig, train: Tensor, test: Tensor, width: int) -> str:
    classes = len(train.unique())
    products = {
        "linear": len(train) * width * classes,
        "few_labels": settings.few_label_draws * settings.labels_per_class * classes * width * classes,
        "knn": len(train) * len(test) * width,
        "geometry": 0,
    }
    seconds = SECONDS_PER_PRODUCT.get(task, 0) * products["linear" if task == "sigma" else task]
    if seconds <= SECONDS_UNASKED:
        return ""
    size = f"{len(train)} images, {classes} classes and {width} features"
    return f"{size} would take up to {seconds / 3600:.1f} h. Ask for it: --evaluate.tasks {task}."
