"""Fine-tuning: the encoder itself continues to learn from 1 % or 10 % of the labels."""

from collections import OrderedDict
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.features import Features, Pixels, extract_features, with_progress
from fastgessl.evaluate.sources import (
    draw_fraction,
    hold_out,
    labels_of,
    numbered,
    require_labels,
    subset,
)
from fastgessl.evaluate.tables import Table
from fastgessl.evaluate.tasks.base import EvaluationTask, Work, register
from fastgessl.evaluate.tasks.gradient_probes import batch_size
from fastgessl.evaluate.tasks.linear import VALIDATION_FRACTION
from fastgessl.models import feature_width
from fastgessl.pipelines.sources.images import Images
from fastgessl.schedules import learning_rate

WEIGHT_DECAY = 0.05
LARGEST_BATCH = 128
WARMUP_SHARE = 0.1


def build_classifier(backbone: nn.Module, classes: int) -> nn.Module:
    """Views (B, 3, S, S) -> logits (B, C), by `backbone` and a linear `head`, which starts at zero: the first
    steps then move the encoder little.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> build_classifier(backbone, 3)(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 3])
    """
    head = nn.Linear(feature_width(backbone), classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(OrderedDict(backbone=backbone, head=head))


def train_classifier(
    classifier: nn.Module,
    images: Images,
    extractor: Extractor,
    *,
    epochs: int,
    lr: float,
    layer_decay: float = 1.0,
) -> None:
    """AdamW with a warm-up over a tenth of the steps and a cosine after it, in place; labels are numbers of
    the head's outputs. Views have the recipe's crops and flips and nothing else, which is what supervised
    training of its backbones takes.

    `layer_decay` below 1 lowers the learning rate of each of the encoder's layers, as timm divides it, by
    that factor from the head down (Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR 2022).
    """
    device = extractor.accelerator.device
    classifier.to(device).train()
    light = replace(
        extractor.pair[0],
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
        solarize_probability=0.0,
    )
    size = min(LARGEST_BATCH, batch_size(len(images)), len(images))
    loader = extractor.loader(images, [light], sharded=False, batch_size=size, training=True)
    total = epochs * len(loader)
    warmup = max(1, round(WARMUP_SHARE * total))
    rates = iter(learning_rate(lr, total, warmup_steps=warmup, shape="cosine", end=0.0))
    optimizer = torch.optim.AdamW(_parameter_groups(classifier, layer_decay), lr=lr)
    for _ in with_progress(range(epochs), "supervised training", extractor.progress):
        for batch in loader:
            rate = float(next(rates))
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            assert batch.label is not None
            loss = F.cross_entropy(classifier(batch.views[0].to(device)), batch.label.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    loader.close()
    classifier.eval()


def logits_of(classifier: nn.Module, images: Images, extractor: Extractor) -> Features:
    """Logits (N, C) of every image, without augmentation, as `Features` with their labels."""
    with closing(extractor.loader(images, [extractor.still], sharded=False)) as loader:
        return extract_features(classifier, loader, extractor.accelerator.device)


def finetune(
    encoder: nn.Module,
    splits: tuple[Images, Images],
    fraction: float,
    extractor: Extractor,
) -> dict[str, Any]:
    """A copy of the encoder with a linear head, trained on a stratified share of the training labels; the
    encoder is left as it was. `splits` are training and test images. Returns the accuracy on the test images,
    with fraction, labelled, the lr that was chosen and the validation accuracy of each (empty where no class
    could give images away), epochs and layer_decay.

    The learning rate is chosen on a fifth of the share, then everything starts again on all of it; test
    labels are read once. Raises UsageError for labels that allow no classifier.
    """
    settings, seed = extractor.config.evaluate, extractor.config.train.seed
    trained: Any = {"epochs": settings.finetune_epochs, "layer_decay": settings.layer_decay}
    train, test = splits
    labels, _ = require_labels("finetune", labels_of(train), labels_of(test))
    classes = labels.unique()
    rows = draw_fraction(labels, fraction, torch.Generator().manual_seed(seed))
    labelled = numbered(subset(train, rows.numpy()), classes)
    fitted, held = hold_out(labels[rows], VALIDATION_FRACTION, torch.Generator().manual_seed(seed))

    def accuracy(seen: Images, judged: Images, lr: float) -> float:
        # The order of images and views follows the loader's seed; dropout, where a backbone has it, follows
        # this one.
        torch.manual_seed(seed)
        classifier = build_classifier(deepcopy(encoder), len(classes))
        train_classifier(classifier, seen, extractor, lr=lr, **trained)
        logits = logits_of(classifier, judged, extractor)
        return logits.accuracy_of(logits.features.argmax(dim=1))

    validation = {}
    if len(settings.finetune_lrs) > 1 and len(held):
        part, rest = (subset(labelled, half.numpy()) for half in (fitted, held))
        validation = {lr: accuracy(part, rest, lr) for lr in settings.finetune_lrs}
    chosen = max(settings.finetune_lrs, key=lambda lr: validation.get(lr, 0.0))
    return {
        "fraction": fraction,
        "labelled": len(rows),
        "accuracy": accuracy(labelled, numbered(test, classes), chosen),
        "lr": chosen,
        "validation": validation,
        **trained,
    }


def _parameter_groups(classifier: nn.Module, layer_decay: float) -> list[dict[str, object]]:
    if layer_decay == 1:
        return param_groups_weight_decay(classifier, WEIGHT_DECAY)
    backbone, head = classifier.get_submodule("backbone"), classifier.get_submodule("head")
    if not hasattr(backbone, "group_matcher"):
        raise UsageError(
            f"evaluate.layer_decay {layer_decay:g} needs a backbone whose layers timm knows, and "
            f"{type(backbone).__name__} does not say which they are. Use --evaluate.layer_decay 1."
        )
    groups = param_groups_layer_decay(backbone, weight_decay=WEIGHT_DECAY, layer_decay=layer_decay)
    return [*groups, {"params": list(head.parameters()), "weight_decay": 0.0}]


def _measure(work: Work) -> dict[str, list[dict[str, Any]]]:
    """Row -> a result per share of the labels."""
    splits = work.sources[0].splits(work.seed)
    encoders = {name: encoder for name, encoder in work.rows.items() if not isinstance(encoder, Pixels)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    runs = [(name, share) for name in encoders for share in work.settings.label_fractions]
    # One bar at a time.
    quiet = replace(work.extractor, quiet=True)
    for name, share in with_progress(runs, "fine-tuning", work.extractor.progress):
        found[name].append(finetune(encoders[name], splits, share, quiet))
    return found


def _tables(measured: dict[str, list[dict[str, Any]]]) -> list[Table]:
    shares = next(iter(measured.values()))
    title = (
        f"Fine-tuned, AdamW, {shares[0]['epochs']} epochs, layer decay {shares[0]['layer_decay']:g}; "
        "learning rate chosen on a validation split"
    )
    headings = [f"{100 * each['fraction']:g} % labels\n({each['labelled']} images)\n%" for each in shares]
    rows = [[name, *(f"{100 * each['accuracy']:.1f}" for each in found)] for name, found in measured.items()]
    return [Table(["encoder", *headings], rows, title)]


register(
    EvaluationTask(
        "finetune",
        _measure,
        tables=_tables,
        place=(4, 0),
    )
)
