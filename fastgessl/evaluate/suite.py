"""The whole evaluation on frozen features: several encoders, the same images, every task that the data
allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.conditions import measure_conditions
from fastgessl.evaluate.features import Features, Pixels, extract_features, extract_views
from fastgessl.evaluate.few_shot import FewShotResult, few_shot
from fastgessl.evaluate.geometry import crowding_ratio, effective_rank, measure_geometry
from fastgessl.evaluate.gradient_probes import gradient_probe
from fastgessl.evaluate.knn import knn_classify, knn_protocols, too_few_neighbours
from fastgessl.evaluate.label_fractions import label_fraction_probe
from fastgessl.evaluate.linear import LinearProbe, few_label_probe, fit_probe, score
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.progress import shown
from fastgessl.evaluate.report import Measurements, Report
from fastgessl.evaluate.sigma import sigma_to_labels
from fastgessl.evaluate.splits import hold_out, unusable_labels
from fastgessl.evaluate.tasks import DEFAULT_TASKS, IMAGE_TASKS, named_tasks, plan_tasks

Measured = TypeVar("Measured")
HELD_OUT_FRACTION = 0.2
# The pairs of uniformity and retrieval grow with the square of the images: 4,096 take 7 s a row on two busy
# cores.
GEOMETRY_IMAGES = 4096


@dataclass(frozen=True)
class EvaluationData:
    """Loaders of one data set; each yields every image once, with `.views`, `.index` and `.label`."""

    train: Iterable[Any]
    """One view an image, without augmentation."""
    test: Iterable[Any] | None = None
    """The same for the test split; without one, a stratified fifth of the labelled training images is held
    out."""
    views: Iterable[Any] | None = None
    """Two augmented views an image, for geometry."""
    held_out: Tensor | None = None
    """(H,) which training images are held out without a test split; None draws a fifth of those that the
    loader yields."""


@dataclass(frozen=True)
class Extracted:
    """An encoder's features of all that is measured."""

    train: Features
    test: Features
    views: tuple[Features, ...] | None
    """The two augmented views of each image, for geometry; None if there are none."""
    pool: Features | None = None
    """Images that few-shot episodes are drawn from; None draws from the test images."""


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

    With several ranks every rank calls this and gets the same report; the ranks share the extraction, and
    rank 0 runs the probes. Raises UsageError for an unknown task, a task asked for by name that the data does
    not allow, and features that are NaN.

    >>> from types import SimpleNamespace as Batch
    >>> loader = [Batch(views=[torch.rand(20, 3, 4, 4)], index=torch.arange(20), label=torch.arange(20) % 2)]
    >>> report = evaluate({"raw pixels": "pixels"}, EvaluationData(loader), EvaluateConfig(tasks=("linear",)))
    >>> sorted(report.rows["raw pixels"]["linear"])
    ['accuracy', 'converged', 'deviation', 'draws', 'labelled', 'weight_decay']
    """
    _require_feature_tasks(settings)
    extracted = {
        name: _extract(encoder, data, settings, seed, device, precision, progress)
        for name, encoder in rows.items()
    }
    return measure(extracted, data.test is None, settings, seed, progress)


def monitor(
    encoder: nn.Module,
    data: EvaluationData,
    settings: EvaluateConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    probe: OnlineProbe | None = None,
) -> dict[str, float]:
    """The quick look during training: effective rank, and with labels k-NN accuracy and the online probe's,
    if there is one, on the test images.

    Takes the same images as `evaluate` with the same `seed`, and leaves the encoder as it was. Every rank
    calls it.
    """
    features = _extract(encoder, replace(data, views=None), settings, seed, device, precision, progress=False)
    return on_first_rank(lambda: _quick_look(features, settings, probe))


def _quick_look(features: Extracted, settings: EvaluateConfig, probe: OnlineProbe | None) -> dict[str, float]:
    measured = {"effective_rank": effective_rank(features.train.features)}
    if unusable_labels(features.train.labels, features.test.labels):
        return measured
    if not too_few_neighbours(len(features.train), settings.knn_k):
        measured["knn"] = knn_classify(
            features.train, features.test, settings.knn_k, settings.knn_temperature
        )
    if probe is not None:
        measured["online_probe"] = probe.accuracy(features.test)
    return measured


def held_out_test(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (kept, held) of the training images, in the order of their index, that train and judge the probes
    without a test split.

    >>> [len(rows) for rows in held_out_test(torch.zeros(10, dtype=torch.int64), seed=0)]
    [8, 2]
    """
    return hold_out(labels, HELD_OUT_FRACTION, torch.Generator().manual_seed(seed))


def _extract(
    encoder: nn.Module | Literal["pixels"],
    data: EvaluationData,
    settings: EvaluateConfig,
    seed: int,
    device: torch.device | str,
    precision: str,
    progress: bool,
) -> Extracted:
    if encoder == "pixels":
        encoder, device, precision = Pixels(), "cpu", "fp32"
    assert isinstance(encoder, nn.Module)
    train = extract_features(encoder, data.train, device, precision, progress)
    if data.test is not None:
        test = extract_features(encoder, data.test, device, precision, progress)
    else:
        train, test = hold_out_features(
            train, _drawn(train, seed) if data.held_out is None else data.held_out
        )
    wants_geometry = wants_views(settings)
    views = (
        extract_views(encoder, data.views, device, precision, progress)
        if data.views is not None and wants_geometry
        else None
    )
    return Extracted(train, test, views)


def wants_views(settings: EvaluateConfig) -> bool:
    """Whether some task looks at augmented views."""
    return bool({"geometry", "conditions"} & set(named_tasks(settings.tasks) or DEFAULT_TASKS))


def hold_out_features(features: Features, held: Tensor) -> tuple[Features, Features]:
    """(kept, held out) of training features for which there is no test split; `held` (H,) are images, not
    rows.
    """
    judged = torch.isin(features.index, held)
    return features.subset((~judged).nonzero().squeeze(1)), features.subset(judged.nonzero().squeeze(1))


def _drawn(features: Features, seed: int) -> Tensor:
    """The images that are held out of those with features; none without labels."""
    return (
        features.index[:0]
        if features.labels is None
        else features.index[held_out_test(features.labels, seed)[1]]
    )


def measure(
    extracted: Mapping[str, Extracted],
    held_out: bool,
    settings: EvaluateConfig,
    seed: int = 0,
    progress: bool = False,
    lenient: bool = False,
) -> Report:
    """The tasks on features that were extracted before, rank 0 at work and the same report on every rank.

    `held_out`: the test images were taken from the training images. Tasks that need the encoder are left to
    their own functions. `lenient` skips a task asked for by name that the data does not allow. Raises
    UsageError as `evaluate` does.
    """
    return on_first_rank(lambda: _measure(extracted, held_out, settings, seed, progress, lenient))


def _require_feature_tasks(settings: EvaluateConfig) -> None:
    """Raises ValueError for tasks that features are not enough for, UsageError for unknown ones."""
    beyond = [
        task for task in named_tasks(settings.tasks) if task in IMAGE_TASKS and "all" not in settings.tasks
    ]
    if beyond:
        raise ValueError(
            f"Task {beyond[0]} takes the encoder and its images, not loaders. Use `fastgessl evaluate "
            f"--tasks {beyond[0]}`."
        )


def _measure(
    extracted: Mapping[str, Extracted],
    held_out: bool,
    settings: EvaluateConfig,
    seed: int,
    progress: bool,
    lenient: bool,
) -> Report:
    for name, features in extracted.items():
        for part in (features.train, features.test, *(features.views or ())):
            part.require_finite(f"Row '{name}'")
    sample = next(iter(extracted.values()))
    width = max(features.train.features.shape[1] for features in extracted.values())
    pool = sample.test if sample.pool is None else sample.pool
    tasks, skipped = plan_tasks(
        settings,
        sample.train.labels,
        sample.test.labels,
        sample.views is not None,
        width,
        pool.labels,
        lenient,
    )
    classes = 0 if sample.train.labels is None else len(sample.train.labels.unique())
    images = {
        "train": len(sample.train),
        "test": len(sample.test),
        "classes": classes,
        "held_out": int(held_out),
    }
    rows: dict[str, Measurements] = {
        name: {"features": {"width": part.train.features.shape[1]}} for name, part in extracted.items()
    }
    probes: dict[str, LinearProbe] = {}
    tasks = tuple(task for task in tasks if task not in IMAGE_TASKS)
    for name, task in shown([(name, task) for name in rows for task in tasks], "measurements", progress):
        if task in ("linear", "sigma") and name not in probes:
            probes[name] = fit_probe(extracted[name].train, seed)
        rows[name][task] = _measure_task(task, extracted[name], probes.get(name), settings, seed)
    return Report(rows, tasks, skipped, images, settings)


def _measure_task(
    task: str, features: Extracted, probe: LinearProbe | None, settings: EvaluateConfig, seed: int
) -> dict[str, Any]:
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
            return {
                "accuracy": accuracy,
                "k": settings.knn_k,
                "temperature": settings.knn_temperature,
                "metric": "cosine",
            }
        case "knn_protocols":
            return {
                "protocols": [
                    asdict(each) | {"accuracy": found} for each, found in knn_protocols(train, test).items()
                ]
            }
        case "linear_sgd" | "mlp":
            hidden = settings.mlp_hidden if task == "mlp" else 0
            return asdict(gradient_probe(train, test, hidden=hidden, epochs=settings.probe_epochs, seed=seed))
        case "label_fractions":
            shares = settings.label_fractions
            found = [
                label_fraction_probe(train, test, share, draws=settings.fraction_draws, seed=seed)
                for share in shares
            ]
            return {"fractions": [asdict(each) for each in found]}
        case "few_shot":
            pool = test if features.pool is None else features.pool
            return {"episodes": [asdict(_few_shot(pool, settings, shots, seed)) for shots in settings.shots]}
        case "conditions":
            first, second = _view_sample(features, seed)
            return asdict(
                measure_conditions(
                    first, second, 0 if train.labels is None else len(train.labels.unique()), seed
                )
            )
    return _geometry(features, seed)


def _few_shot(test: Features, settings: EvaluateConfig, shots: int, seed: int) -> FewShotResult:
    return few_shot(
        test, ways=settings.ways, shots=shots, queries=settings.queries, episodes=settings.episodes, seed=seed
    )


def _view_sample(features: Extracted, seed: int) -> tuple[Tensor, Tensor]:
    """Both views of a seeded sample of the images, (N, F) each."""
    assert features.views is not None
    if len(features.views) != 2:
        raise ValueError(
            f"The loader of augmented views yields {len(features.views)} views an image; geometry takes two."
        )
    first, second = features.views
    rows = view_sample(len(first), seed)
    return first.features[rows], second.features[rows]


def view_sample(count: int, seed: int) -> Tensor:
    """Which of `count` images augmented views are looked at: at most 4,096, increasing."""
    return (
        torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:GEOMETRY_IMAGES].sort().values
    )


def _geometry(features: Extracted, seed: int) -> dict[str, Any]:
    geometry = asdict(measure_geometry(*_view_sample(features, seed)))
    labels = features.train.labels
    if labels is not None and len(labels.unique()) > 1:
        geometry["crowding"] = crowding_ratio(features.train.features, labels)
    return geometry


def on_first_rank(measure: Callable[[], Measured]) -> Measured:
    """Measure on rank 0; every rank waits for what it found, as long as the process group's timeout allows,
    and returns it or raises its error."""
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
