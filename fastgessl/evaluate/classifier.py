"""A classifier trained on images: the encoder with a linear head, from its present weights or from none. For
fine-tuning, and for the supervised, task-specific models that σ is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate.features import Features, extract_features
from fastgessl.evaluate.gradient_probes import batch_size
from fastgessl.evaluate.progress import shown
from fastgessl.models import feature_width
from fastgessl.pipelines import Loader
from fastgessl.pipelines.sources.images import Images
from fastgessl.schedules import learning_rate

WEIGHT_DECAY = 0.05
LARGEST_BATCH = 128
WARMUP_SHARE = 0.1


class Classifier(nn.Module):
    """Views (B, 3, S, S) -> logits (B, C). The head starts at zero: the first steps then move the encoder
    little.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> Classifier(backbone, 3)(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 3])
    """

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(feature_width(backbone), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, views: Tensor) -> Tensor:
        return self.head(self.backbone(views))


@dataclass(frozen=True)
class ClassifierLoaders:
    """How images become batches: `training` shuffled with light augmentation, `still` each once without."""

    training: Callable[[Images, int], Loader]
    """Images and batch size -> loader of one view an image."""
    still: Callable[[Images], Loader]


def train_classifier(
    classifier: Classifier,
    images: Images,
    loaders: ClassifierLoaders,
    device: torch.device,
    *,
    epochs: int,
    lr: float,
    layer_decay: float = 1.0,
    progress: bool = False,
) -> Classifier:
    """AdamW with a warm-up over a tenth of the steps and a cosine after it, in place; labels are numbers of
    the head's outputs.

    `layer_decay` below 1 lowers the learning rate of each of the encoder's layers, as timm divides it, by
    that factor from the head down (Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR 2022).
    """
    classifier.to(device).train()
    loader = loaders.training(images, min(LARGEST_BATCH, batch_size(len(images)), len(images)))
    total = epochs * len(loader)
    rates = learning_rate(
        lr, total, warmup_steps=max(1, round(WARMUP_SHARE * total)), shape="cosine", end=0.0
    )
    optimizer = torch.optim.AdamW(_parameter_groups(classifier, layer_decay), lr=lr)
    step = 0
    for _ in shown(range(epochs), "supervised training", progress):
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = float(rates[step]) * group.get("lr_scale", 1.0)
            assert batch.label is not None
            loss = F.cross_entropy(classifier(batch.views[0].to(device)), batch.label.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    loader.close()
    return classifier.eval()


def logits_of(
    classifier: Classifier, images: Images, loaders: ClassifierLoaders, device: torch.device
) -> Features:
    """Logits (N, C) of every image, without augmentation, as `Features` with their labels."""
    loader = loaders.still(images)
    try:
        return extract_features(classifier, loader, device)
    finally:
        loader.close()


def _parameter_groups(classifier: Classifier, layer_decay: float) -> list[dict[str, object]]:
    if layer_decay == 1:
        decayed = [p for p in classifier.parameters() if p.ndim > 1]
        return [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in classifier.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if not hasattr(classifier.backbone, "group_matcher"):
        raise UsageError(
            f"evaluate.layer_decay {layer_decay:g} needs a backbone whose layers timm knows, and "
            f"{type(classifier.backbone).__name__} does "
            "not say which they are. Use --evaluate.layer_decay 1."
        )
    groups = param_groups_layer_decay(classifier.backbone, weight_decay=WEIGHT_DECAY, layer_decay=layer_decay)
    return [*groups, {"params": list(classifier.head.parameters()), "weight_decay": 0.0}]
