"""The whole evaluation: several encoders, the same images, every task that the data allows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate.features import Features, Pixels, extract_features, extract_views
from fastgessl.evaluate.geometry import crowding_ratio, measure_geometry
from fastgessl.evaluate.knn import knn_classify, too_few_neighbours
from fastgessl.evaluate.linear import LinearProbe, few_label_probe, fit_probe, score
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.progress import shown
from fastgessl.evaluate.report import Measurements, Report
from fastgessl.evaluate.sigma import sigma_to_labels
from fastgessl.evaluate.splits import hold_out, too_few_labels, unusable_labels

Measured = TypeVar("Measured")
TASKS = ("linear", "few_labels", "knn", "sigma", "geometry")
HELD_OUT_FRACTION = 0.2
# The pairs of uniformity and retrieval grow with the square of the images: 4,096 take 7 s a row on two busy cores.
GEOMETRY_IMAGES = 4096
# What nobody asked for by name must not hold up the end of a run, nor outlast the ten minutes that NCCL lets the other ranks wait.
SECONDS_UNASKED = 600.0
# Measured: 20 s for a probe on 50,000 × 512 × 10 with its search, a fit alone a quarter; 13 s for k-NN of 10,000 against 50,000 × 512.
SECONDS_PER_PRODUCT = {"linear": 8e-8, "sigma": 8e-8, "few_labels": 2e-8, "knn": 5e-11}


@dataclass(frozen=True)
class EvaluationData:
    """Loaders of one data set; each yields every image once, with `.views`, `.index` and `.label`."""

    train: Iterable[Any]
    """One view an image, without augmentation."""
    test: Iterable[Any] | None = None
    """The same for the test split; without one, a stratified fifth of the labelled training images is held out."""
    views: Iterable[Any] | None = None
    """Two augmented views an image, for geometry."""


@dataclass(frozen=True)
class _Extracted:
    """An encoder's features of all that is measured."""

    train: Features
    test: Features
    views: tuple[Features, ...] | None


def evaluate(
    rows: Mapping[str, nn.Module | Literal["pixels"]],
    data: EvaluationData,
    settings: EvaluateConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: bool = False,
) -> Report:
    """Measure every row (an encoder on `device`, or "pixels") on the same images and splits.

    With several ranks every rank calls this and gets the same report; the ranks share the extraction, and rank 0 runs the probes. Raises
    UsageError for an unknown task, a task asked for by name that the data does not allow, and features that are NaN.

    >>> from types import SimpleNamespace as Batch
    >>> loader = [Batch(views=[torch.rand(20, 3, 4, 4)], index=torch.arange(20), label=torch.arange(20) % 2)]
    >>> report = evaluate({"raw pixels": "pixels"}, EvaluationData(loader), EvaluateConfig(tasks=("linear",)))
    >>> sorted(report.rows["raw pixels"]["linear"])
    ['accuracy', 'converged', 'deviation', 'draws', 'labelled', 'weight_decay']
    """
    require_known_tasks(settings.tasks)
    extracted = {name: _extract(encoder, data, settings, seed, device, precision, progress) for name, encoder in rows.items()}
    return _on_first_rank(lambda: _measure(extracted, data.test is None, settings, seed, progress))


def monitor(
    encoder: nn.Module,
    data: EvaluationData,
    settings: EvaluateConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    probe: OnlineProbe | None = None,
) -> dict[str, float]:
    """The quick look during training: k-NN accuracy and, with an online probe, its accuracy on the test images. Empty without labels.

    Takes the same images as `evaluate` with the same `seed`, and leaves the encoder as it was. Every rank calls it.
    """
    features = _extract(encoder, EvaluationData(data.train, data.test), settings, seed, device, precision, progress=False)
    return _on_first_rank(lambda: _quick_look(features, settings, probe))


def _quick_look(features: _Extracted, settings: EvaluateConfig, probe: OnlineProbe | None) -> dict[str, float]:
    if unusable_labels(features.train.labels, features.test.labels):
        return {}
    measured = {}
    if not too_few_neighbours(len(features.train), settings.knn_k):
        measured["knn"] = knn_classify(features.train, features.test, settings.knn_k, settings.knn_temperature)
    if probe is not None:
        measured["online_probe"] = probe.accuracy(features.test)
    return measured


def require_known_tasks(tasks: Iterable[str]) -> None:
    """Raises UsageError, with the nearest name and all known ones, for a task that does not exist. Cheap: call it before training."""
    for task in tasks:
        if task not in TASKS:
            nearest = difflib.get_close_matches(task, TASKS, n=1)
            hint = f" Perhaps you meant {nearest[0]}." if nearest else ""
            raise UsageError(f"evaluate.tasks names an unknown task '{task}'.{hint} Known tasks: {', '.join(TASKS)}.")


def plan_tasks(
    settings: EvaluateConfig, train: Tensor | None, test: Tensor | None, has_views: bool, width: int = 0
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which tasks run, and which the data does not allow with the reason, from the labels of both splits (N,), (M,) or None.

    Tasks named in `settings.tasks` must be possible, else UsageError; with none named, those that are possible run, and for features of
    `width` columns those that take no longer than ten minutes.

    >>> plan_tasks(EvaluateConfig(tasks=("linear",)), torch.tensor([0, 1]), torch.tensor([1]), has_views=False)
    (('linear',), {})
    """
    require_known_tasks(settings.tasks)
    obstacles = {task: _obstacle(task, settings, train, test, has_views) for task in settings.tasks or TASKS}
    if not settings.tasks and train is not None and test is not None:
        obstacles = {task: obstacle or _too_slow(task, settings, train, test, width) for task, obstacle in obstacles.items()}
    skipped = {task: obstacle for task, obstacle in obstacles.items() if obstacle}
    if settings.tasks and skipped:
        task, obstacle = next(iter(skipped.items()))
        raise UsageError(f"Task {task}: {obstacle}")
    return tuple(task for task in obstacles if task not in skipped), skipped


def held_out_test(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (kept, held) of the training images, in the order of their index, that train and judge the probes without a test split.

    >>> [len(rows) for rows in held_out_test(torch.zeros(10, dtype=torch.int64), seed=0)]
    [8, 2]
    """
    return hold_out(labels, HELD_OUT_FRACTION, torch.Generator().manual_seed(seed))


def _obstacle(task: str, settings: EvaluateConfig, train: Tensor | None, test: Tensor | None, has_views: bool) -> str:
    if task == "geometry":
        return "" if has_views else "there is no loader of augmented views."
    obstacle = unusable_labels(train, test)
    if obstacle or train is None:
        return obstacle
    if task == "few_labels":
        return too_few_labels(train, settings.labels_per_class)
    return too_few_neighbours(len(train), settings.knn_k) if task == "knn" else ""


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


def _extract(
    encoder: nn.Module | Literal["pixels"],
    data: EvaluationData,
    settings: EvaluateConfig,
    seed: int,
    device: torch.device | str,
    precision: str,
    progress: bool,
) -> _Extracted:
    if encoder == "pixels":
        encoder, device, precision = Pixels(), "cpu", "fp32"
    assert isinstance(encoder, nn.Module)
    train = extract_features(encoder, data.train, device, precision, progress)
    if data.test is not None:
        test = extract_features(encoder, data.test, device, precision, progress)
    else:
        train, test = _hold_out_features(train, seed)
    wants_geometry = "geometry" in (settings.tasks or TASKS)
    views = extract_views(encoder, data.views, device, precision, progress) if data.views is not None and wants_geometry else None
    return _Extracted(train, test, views)


def _hold_out_features(features: Features, seed: int) -> tuple[Features, Features]:
    if features.labels is None:
        return features, features.subset(torch.empty(0, dtype=torch.int64))
    kept, held = held_out_test(features.labels, seed)
    return features.subset(kept), features.subset(held)


def _measure(extracted: dict[str, _Extracted], held_out: bool, settings: EvaluateConfig, seed: int, progress: bool) -> Report:
    for name, features in extracted.items():
        for part in (features.train, features.test, *(features.views or ())):
            part.require_finite(f"Row '{name}'")
    sample = next(iter(extracted.values()))
    width = max(features.train.features.shape[1] for features in extracted.values())
    tasks, skipped = plan_tasks(settings, sample.train.labels, sample.test.labels, sample.views is not None, width)
    classes = 0 if sample.train.labels is None else len(sample.train.labels.unique())
    images = {"train": len(sample.train), "test": len(sample.test), "classes": classes, "held_out": int(held_out)}
    rows: dict[str, Measurements] = {name: {"features": {"width": part.train.features.shape[1]}} for name, part in extracted.items()}
    probes: dict[str, LinearProbe] = {}
    for name, task in shown([(name, task) for name in rows for task in tasks], "measurements", progress):
        if task in ("linear", "sigma") and name not in probes:
            probes[name] = fit_probe(extracted[name].train, seed)
        rows[name][task] = _measure_task(task, extracted[name], probes.get(name), settings, seed)
    return Report(rows, tasks, skipped, images, settings)


def _measure_task(task: str, features: _Extracted, probe: LinearProbe | None, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    train, test = features.train, features.test
    match task:
        case "linear":
            assert probe is not None
            return asdict(score(probe, train, test))
        case "sigma":
            return asdict(sigma_to_labels(train, test, probe))
        case "few_labels":
            few = few_label_probe(train, test, settings.labels_per_class, seed, settings.few_label_draws)
            return {**asdict(few), "labels_per_class": settings.labels_per_class}
        case "knn":
            accuracy = knn_classify(train, test, settings.knn_k, settings.knn_temperature)
            return {"accuracy": accuracy, "k": settings.knn_k, "temperature": settings.knn_temperature, "metric": "cosine"}
    return _geometry(features, seed)


def _geometry(features: _Extracted, seed: int) -> dict[str, Any]:
    assert features.views is not None
    if len(features.views) != 2:
        raise ValueError(f"The loader of augmented views yields {len(features.views)} views an image; geometry takes two.")
    first, second = features.views
    rows = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:GEOMETRY_IMAGES].sort().values
    geometry = asdict(measure_geometry(first.features[rows], second.features[rows]))
    labels = features.train.labels
    if labels is not None and len(labels.unique()) > 1:
        geometry["crowding"] = crowding_ratio(features.train.features, labels)
    return geometry


def _on_first_rank(measure: Callable[[], Measured]) -> Measured:
    """Measure on rank 0; every rank returns what it found or raises its error."""
    if not (dist.is_available() and dist.is_initialized()):
        return measure()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [measure()]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
