"""BYOL: predict a momentum encoder's projection of the other view. No negatives.

Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, eq. (2) and (3), section 3.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from fastgessl.config import MethodConfig
from fastgessl.kernels.prototypes import other_views
from fastgessl.methods.base import Outputs, RunFacts, Similarity, register
from fastgessl.methods.momentum import MomentumMethod
from fastgessl.models import Projector, feature_width


@register("byol")
class BYOL(MomentumMethod):
    """Two views and, if asked for, smaller ones; projector and predictor. State: the momentum encoder, an
    exponential moving average of the online weights, which sees the two views of full size.

    >>> from torch import nn
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> config = MethodConfig(name="byol", projector_hidden=16, projector_out=4, predictor_hidden=16)
    >>> method = BYOL(config, backbone, RunFacts(total_steps=100))
    >>> views = [torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)]
    >>> out, targets = method(views), method.targets(views)
    >>> tuple(out.predictions.shape), tuple(targets.shape), tuple(method.loss(out, targets).shape)
    ((2, 5, 4), (2, 5, 4), ())
    """

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        outputs = config.projector_out
        self.projector = Projector(feature_width(backbone), config.projector_hidden, outputs)
        self.predictor = Projector(outputs, config.predictor_hidden, outputs)
        self.copy_parts(config, facts)

    @torch.no_grad()
    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The momentum encoder's projections of the two views of full size (2, N, D), with the batch
        statistics of these views.
        """
        return self.momentum_projections(views[: self.views_per_sample])

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """Mean over images of 2 - 2 cos(prediction, momentum projection of another view), summed over the two
        views of full size.

        Smaller views join the other one: their mean is taken, so that two views are the paper's. Returns
        ()."""
        assert out.predictions is not None
        pairs = other_views(out.predictions, len(aux))
        return torch.stack(
            [(2 - 2 * cosine_similarity(others, aux[view], dim=-1)).mean() for view, others in pairs]
        ).sum()

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task: predictions over the momentum projections of another view, for both views of full
        size.
        """
        assert out.predictions is not None
        queries, keys = normalize(out.predictions, dim=-1), normalize(aux, dim=-1)
        return tuple(
            Similarity(others.flatten(0, 1), keys[view], self.temperature)
            for view, others in other_views(queries, len(keys))
        )
