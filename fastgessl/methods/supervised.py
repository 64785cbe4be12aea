"""Supervised classification with the same backbone, views and budget: the upper bound that self-supervised
methods are measured against.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastgessl.config import MethodConfig, UsageError
from fastgessl.methods.base import Method, Outputs, RunFacts, Similarity, register
from fastgessl.models import at_least_float32, encode, feature_width


@register("supervised")
class Supervised(Method):
    """Any number of views and one linear layer without bias over the representation. Keeps no state.

    >>> import torch
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> method = Supervised(MethodConfig(name="supervised"), backbone, RunFacts(classes=3))
    >>> views = [torch.randn(5, 3, 2, 2)]
    >>> labels = method.targets(views, torch.tensor([0, 1, 2, 0, 1]))
    >>> tuple(method.loss(method(views), labels).shape)
    ()
    """

    needs_labels = True
    multi_crop = True

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__()
        if facts.classes is None:
            raise UsageError(
                "method 'supervised' learns from labels, and the training images have none. Point "
                "--data.root at images with labels "
                "(a folder a class, or train_y in the .npz), or take a self-supervised method."
            )
        self.backbone = backbone
        self.classifier = nn.Linear(feature_width(backbone), facts.classes, bias=False)

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """V views (N, 3, S, S), or their features (V, N, F) -> the features as projections, the class vectors
        (C, F) as prototypes.
        """
        features = encode(self.backbone, views, features)
        return Outputs(features, at_least_float32(features), prototypes=self.classifier.weight)

    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor | None:
        """The labels (N,)."""
        return labels

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """Cross-entropy of the labels `aux` (N,), averaged over views and images. Returns (), in nats."""
        return cross_entropy(_logits(out).flatten(0, 1), aux.repeat(len(out.projections)))

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task: every view's softmax over the classes."""
        assert out.prototypes is not None
        return tuple(Similarity(view, out.prototypes, 1.0) for view in out.projections)

    def measures(self, out: Outputs, aux: Any = None) -> dict[str, Tensor]:
        """train_accuracy: share of this mini-batch's views that are given their class."""
        return {"train_accuracy": (_logits(out).argmax(-1) == aux).to(out.projections.dtype).mean()}


def _logits(out: Outputs) -> Tensor:
    """(V, N, C)."""
    assert out.prototypes is not None
    return out.projections @ out.prototypes.T
