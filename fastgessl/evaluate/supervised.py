"""Supervised, task-specific models: what σ measures a frozen one against. Trained once for a data set and
kept beside the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgessl.evaluate.cache import digest_of
from fastgessl.evaluate.classifier import Classifier, logits_of, train_classifier
from fastgessl.evaluate.extraction import Extraction
from fastgessl.evaluate.finetune import numbered
from fastgessl.evaluate.sources import Source
from fastgessl.evaluate.splits import require_labels
from fastgessl.evaluate.subject import untrained_encoder
from fastgessl.pipelines.sources.images import Images

# AdamW with a batch of 128, as DeiT-style recipes scale it for small sets.
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class TaskModel:
    """A task's own model: log-probabilities on its images, classes in the order of the training labels."""

    train: Tensor
    """(N, C) float64."""
    test: Tensor
    """(M, C) float64."""
    test_accuracy: float


def task_model(source: Source, extraction: Extraction, folder: Path) -> TaskModel:
    """The supervised model of a data set: the encoder's architecture, trained from its initial weights on all
    training labels.

    Kept as `<folder>/<data set>.safetensors` and trained anew if the model, the images, the views or the
    settings have changed.
    """
    train, test = source.splits(extraction.config.train.seed)
    labels, _ = require_labels("universality", _tensor(train), _tensor(test))
    classes = labels.unique()
    train, test = numbered(train, classes), numbered(test, classes)
    classifier = _kept_or_trained(train, len(classes), extraction, folder / f"{source.slug}.safetensors")
    device, loaders = extraction.accelerator.device, extraction.classifier_loaders()
    logits, test_logits = (logits_of(classifier, images, loaders, device) for images in (train, test))
    assert test_logits.labels is not None
    accuracy = (test_logits.features.argmax(dim=1) == test_logits.labels).double().mean().item()
    own, unseen = (found.features.double().log_softmax(dim=1) for found in (logits, test_logits))
    return TaskModel(own, unseen, accuracy)


def _kept_or_trained(train: Images, classes: int, extraction: Extraction, path: Path) -> Classifier:
    config, device = extraction.config, extraction.accelerator.device
    classifier = Classifier(untrained_encoder(config), classes)
    key = digest_of(
        classifier,
        train,
        [extraction.still, *extraction.pair],
        config.evaluate.supervised_epochs,
        LEARNING_RATE,
    )
    kept = _read(path, key)
    if kept is not None:
        classifier.load_state_dict(kept)
        return classifier.to(device).eval()
    train_classifier(
        classifier,
        train,
        extraction.classifier_loaders(),
        device,
        epochs=config.evaluate.supervised_epochs,
        lr=LEARNING_RATE,
        progress=extraction.accelerator.is_main_process,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()},
        temporary,
        {"key": key},
    )
    temporary.replace(path)
    return classifier


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The weights of a kept model; None if there is none of this key."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _tensor(images: Images) -> Tensor | None:
    return None if images.labels is None else torch.from_numpy(images.labels)
