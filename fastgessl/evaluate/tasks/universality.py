"""Evaluation universality: how near a frozen model comes to the model specialized to each task, in σ.

"Explicitly Modeling Universality into Self-Supervised Learning", arXiv 2405.01053v4. σ of a task is the mean
KL(π* ‖ π_f) over its images: π_f a probe on the frozen features, π* the labels or a supervised model of the
task's own. The paper asks for three things, and each is a set of tasks: discriminability (the training images
of the training classes), generalisation (unseen images of these classes), and transferability (unseen data
sets). docs/universality.md maps the definitions to these functions.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastgessl import runs
from fastgessl.evaluate.extraction import Extractor, digest_of
from fastgessl.evaluate.features import Features, with_progress
from fastgessl.evaluate.sources import Source, hold_out, labels_of, numbered, require_labels
from fastgessl.evaluate.subject import untrained_encoder
from fastgessl.evaluate.tables import Table
from fastgessl.evaluate.tasks.base import EvaluationTask, Work, register
from fastgessl.evaluate.tasks.finetune import build_classifier, logits_of, train_classifier
from fastgessl.evaluate.tasks.gradient_probes import SgdProtocol, fit_gradient_probe
from fastgessl.evaluate.tasks.linear import VALIDATION_FRACTION, Probe, fit_probe
from fastgessl.pipelines.sources.images import Images

GROUPS = ("discriminability", "generalisation", "transferability")
# AdamW with a batch of 128, as DeiT-style recipes scale it for small sets.
LEARNING_RATE = 1e-3


def kl_divergence(target: Tensor, model: Tensor) -> float:
    """Mean over rows of KL(target ‖ model), log-probabilities (N, C) each, in nats; a target of probability 0
    counts 0.

    >>> same = torch.tensor([[0.25, 0.75]]).log()
    >>> kl_divergence(same, same)
    0.0
    """
    terms = torch.where(target == -torch.inf, 0.0, target.exp() * (target - model))
    return terms.sum(dim=1).mean().item()


def choose_probe(train: Features, protocol: SgdProtocol) -> tuple[str, Probe]:
    """("linear", probe) or ("mlp", probe), fitted on all training images: the one whose cross-entropy on a
    held-out fifth was lower. `protocol` is the MLP's.

    The linear one where no class can give a fifth away. Raises UsageError as `linear_probe` does.
    """
    labels, _ = require_labels("universality", train.labels, train.labels)
    fitted, held = hold_out(labels, VALIDATION_FRACTION, torch.Generator().manual_seed(protocol.seed))
    if len(held):
        part, rest = train.subset(fitted), train.subset(held)
        mlp = fit_gradient_probe(part, protocol)
        if mlp.cross_entropy(rest) < fit_probe(part, protocol.seed).cross_entropy(rest):
            return "mlp", fit_gradient_probe(train, replace(protocol, rates=(mlp.chosen["learning_rate"],)))
    return "linear", fit_probe(train, protocol.seed)


def task_sigma(
    task: str, group: str, images: Features, probe: Probe, kind: str, target: Tensor | None = None
) -> dict[str, Any]:
    """σ on labelled images of a data set, `task`, which stands for discriminability, generalisation or
    transferability; `target` (N, C) are log-probabilities of the task's own model, None for the labels.

    Beside it the accuracy of the same probe on the same images: a low σ is not by itself a high one.
    """
    if target is None:
        sigma, name = probe.cross_entropy(images), "labels"
    else:
        sigma, name = kl_divergence(target.double(), probe.log_probabilities(images.features)), "supervised"
    return {
        "task": task,
        "group": group,
        "target": name,
        "probe": kind,
        "sigma": sigma,
        "accuracy": probe.accuracy(images),
        "images": len(images),
    }


def summed(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The tasks with the sums of σ by group and over all, the paper's evaluation universality; low is
    universal.

    >>> summed([{"group": "generalisation", "sigma": 0.5}])["total"]
    0.5
    """
    groups = {group: [task["sigma"] for task in tasks if task["group"] == group] for group in GROUPS}
    sums = {group: sum(values) for group, values in groups.items() if values}
    return {"tasks": tasks, "groups": sums, "total": sum(sums.values())}


def task_model(source: Source, extractor: Extractor, folder: Path) -> tuple[Tensor, Tensor, float]:
    """The supervised model of a data set: the encoder's architecture, trained from its initial weights on all
    training labels. Returns its log-probabilities, (N, C) and (M, C) float64, on the training and the test
    images, classes in the order of the training labels, and its test accuracy.

    Kept as `<folder>/<data set>.safetensors` and trained again if the model, the images, the views or the
    settings have changed.
    """
    train, test = source.splits(extractor.config.train.seed)
    labels, _ = require_labels("universality", labels_of(train), labels_of(test))
    classes = labels.unique()
    train, test = numbered(train, classes), numbered(test, classes)
    classifier = build_classifier(untrained_encoder(extractor.config), len(classes))
    _train_or_read(classifier, train, extractor, folder / f"{source.slug}.safetensors")
    seen, unseen = (logits_of(classifier, images, extractor) for images in (train, test))
    own, other = (logits.features.double().log_softmax(dim=1) for logits in (seen, unseen))
    return own, other, unseen.accuracy_of(other.argmax(dim=1))


def _train_or_read(classifier: nn.Module, train: Images, extractor: Extractor, path: Path) -> None:
    epochs, views = extractor.config.evaluate.supervised_epochs, [extractor.still, *extractor.pair]
    key = digest_of(classifier, train, views, epochs, LEARNING_RATE)
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") == key:
            classifier.load_state_dict(load_file(path))
            classifier.to(extractor.accelerator.device).eval()
            return
    train_classifier(classifier, train, extractor, epochs=epochs, lr=LEARNING_RATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
    runs.write_bytes(path, save(weights, {"key": key}))


def _measure(work: Work) -> dict[str, Any]:
    """Row -> σ of each task with the sums; the supervised models, where they are the target, are trained
    first.
    """
    settings = work.settings
    models: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    reached = {}
    for source in work.sources if settings.sigma_against == "supervised" else ():
        seen, unseen, accuracy = task_model(source, work.extractor, work.folder / "task_models")
        models[source.name], reached[source.name] = (seen, unseen), accuracy
    sigmas: dict[str, list[dict[str, Any]]] = {row: [] for row in work.rows}
    pairs = [(source.name, row) for source in work.sources for row in work.rows]
    for data, row in with_progress(pairs, "universality", work.extractor.progress):
        features = work.features[data][row]
        features.test.require_finite(f"Row '{row}'")
        protocol = SgdProtocol(settings.mlp_hidden, settings.probe_epochs, work.seed, device=features.device)
        kind, probe = choose_probe(features.train, protocol)
        own, other = models.get(data, (None, None))
        group = "transferability"
        if data == work.sources[0].name:
            group = "generalisation"
            sigmas[row].append(task_sigma(data, "discriminability", features.train, probe, kind, own))
        sigmas[row].append(task_sigma(data, group, features.test, probe, kind, other))
    return {
        "rows": {row: summed(tasks) for row, tasks in sigmas.items()},
        "target": settings.sigma_against,
        "task_model_accuracy": reached,
    }


def _tables(measured: dict[str, Any]) -> list[Table]:
    target = {"labels": "the labels", "supervised": "supervised task models"}[measured["target"]]
    tasks = next(iter(measured["rows"].values()))["tasks"]
    headings = [f"{task['task']}\n{task['group']}\n{task['images']} images" for task in tasks]
    rows = []
    for name, found in measured["rows"].items():
        cells = [
            f"{task['sigma']:.3f} ({100 * task['accuracy']:.1f}) {task['probe']}" for task in found["tasks"]
        ]
        rows.append([name, *cells, f"{found['total']:.3f}"])
    reached = ", ".join(
        f"{name} {100 * accuracy:.1f} %" for name, accuracy in measured["task_model_accuracy"].items()
    )
    return [
        Table(
            ["encoder", *headings, "sum"],
            rows,
            f"Universality: σ against {target}, nats (accuracy of the same probe, %); low is universal",
            f"test accuracy of the supervised task models: {reached}" if reached else "",
        )
    ]


register(
    EvaluationTask(
        "universality",
        _measure,
        tables=_tables,
        place=(4, 1),
        transfer=True,
    )
)
