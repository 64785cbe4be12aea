"""Fine-tuning: the encoder itself goes on learning from 1 % or 10 % of the labels."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastgessl.config import EvaluateConfig
from fastgessl.evaluate.cache import subset
from fastgessl.evaluate.classifier import Classifier, ClassifierLoaders, logits_of, train_classifier
from fastgessl.evaluate.label_fractions import draw_fraction
from fastgessl.evaluate.linear import VALIDATION_FRACTION
from fastgessl.evaluate.splits import hold_out, require_labels
from fastgessl.pipelines.sources.images import Images


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracy on the test images after fine-tuning on a share of the labels."""

    fraction: float
    labelled: int
    accuracy: float
    lr: float
    """As chosen."""
    validation: dict[float, float]
    """Learning rate -> accuracy on the held-out fifth of the labelled images; empty where no class could give
    one away."""
    epochs: int
    layer_decay: float


def finetune(
    encoder: nn.Module,
    train: Images,
    test: Images,
    fraction: float,
    settings: EvaluateConfig,
    loaders: ClassifierLoaders,
    device: torch.device,
    seed: int = 0,
    progress: bool = False,
) -> FinetuneResult:
    """A copy of the encoder with a linear head, trained on a stratified share of the training labels; the
    encoder stays as it was.

    The learning rate is chosen on a fifth of the share, then everything starts anew on all of it; test labels
    are read once. Raises UsageError for labels that allow no classifier.
    """
    labels, _ = require_labels("finetune", _labels(train), _labels(test))
    rows = draw_fraction(labels, fraction, torch.Generator().manual_seed(seed))
    labelled, classes = numbered(subset(train, rows.numpy()), labels.unique()), len(labels.unique())
    fitted, held = hold_out(labels[rows], VALIDATION_FRACTION, torch.Generator().manual_seed(seed))

    def trained(images: Images, lr: float) -> Classifier:
        # The order of images and views follows the loader's seed; dropout, where a backbone has it, follows
        # this one.
        torch.manual_seed(seed)
        classifier = Classifier(deepcopy(encoder), classes)
        decay, epochs = settings.layer_decay, settings.finetune_epochs
        return train_classifier(
            classifier, images, loaders, device, epochs=epochs, lr=lr, layer_decay=decay, progress=progress
        )

    validation = {}
    if len(settings.finetune_lrs) > 1 and len(held):
        part, rest = subset(labelled, fitted.numpy()), subset(labelled, held.numpy())
        validation = {lr: _accuracy(trained(part, lr), rest, loaders, device) for lr in settings.finetune_lrs}
    chosen = max(settings.finetune_lrs, key=lambda lr: validation.get(lr, 0.0))
    known = numbered(test, labels.unique())
    accuracy = _accuracy(trained(labelled, chosen), known, loaders, device)
    return FinetuneResult(
        fraction, len(rows), accuracy, chosen, validation, settings.finetune_epochs, settings.layer_decay
    )


def _accuracy(
    classifier: Classifier, images: Images, loaders: ClassifierLoaders, device: torch.device
) -> float:
    found = logits_of(classifier, images, loaders, device)
    assert found.labels is not None
    return (found.features.argmax(dim=1) == found.labels).double().mean().item()


def _labels(images: Images) -> Tensor | None:
    return None if images.labels is None else torch.from_numpy(images.labels)


def numbered(images: Images, classes: Tensor) -> Images:
    """The same images with labels that are positions in `classes` (C,), increasing."""
    labels = _labels(images)
    assert labels is not None
    return replace(images, labels=torch.searchsorted(classes, labels).numpy())
