"""MoCo v3: predict which momentum-encoded projection in the batch is that of the image's other view. No
queue.

Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021, algorithm
1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.kernels import info_nce
from fastgessl.kernels.collectives import rank_and_size
from fastgessl.kernels.prototypes import other_views
from fastgessl.methods.base import Outputs, RunFacts, Similarity, register
from fastgessl.methods.momentum import MomentumMethod
from fastgessl.models import MoCoV3Head, feature_width


@register("mocov3")
class MoCoV3(MomentumMethod):
    """Two views and, if asked for, smaller ones; projector and predictor. State: the momentum encoder.

    A vision transformer keeps its random patch embedding, and gets a projector of three layers and a batch
    norm behind the predictor.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> config = MethodConfig(name="mocov3", projector_hidden=16, projector_out=4, predictor_hidden=16)
    >>> method = MoCoV3(config, backbone, RunFacts(total_steps=100))
    >>> views = [torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)]
    >>> out, keys = method(views), method.targets(views)
    >>> tuple(out.predictions.shape), tuple(keys.shape), tuple(method.loss(out, keys).shape)
    ((2, 5, 4), (2, 5, 4), ())
    """

    compares_images = True
    rings = True

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        transformer = isinstance(backbone, VisionTransformer)
        if isinstance(backbone, VisionTransformer):
            backbone.patch_embed.requires_grad_(False)
        outputs = config.projector_out
        self.projector = MoCoV3Head(
            feature_width(backbone),
            config.projector_hidden,
            outputs,
            layers=3 if transformer else 2,
            output_norm=True,
        )
        self.predictor = MoCoV3Head(
            outputs, config.predictor_hidden, outputs, layers=2, output_norm=transformer
        )
        self.copy_parts(config, facts)

    @torch.no_grad()
    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The momentum encoder's unit projections of the two views of full size (2, N, D)."""
        return normalize(self.momentum_projections(views[: self.views_per_sample]), dim=-1)

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """2τ · InfoNCE of predictions over the keys of all ranks, summed over the two keyed views, averaged
        over the others. Returns ().
        """
        rank, _ = rank_and_size(self.group)
        terms = []
        for keyed, queries in self._queries(out):
            own = rank * queries.shape[1] + torch.arange(queries.shape[1], device=queries.device).repeat(
                len(queries)
            )
            terms.append(
                info_nce(
                    queries.flatten(0, 1),
                    aux[keyed],
                    temperature=self.temperature,
                    positives=own,
                    group=self.group,
                    mode=self.exchange,
                )
            )
        return 2 * self.temperature * torch.stack(terms).sum()

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task: predictions over the momentum projections of another view, for each keyed view."""
        return tuple(
            Similarity(queries.flatten(0, 1), aux[keyed], self.temperature)
            for keyed, queries in self._queries(out)
        )

    def _queries(self, out: Outputs) -> list[tuple[int, Tensor]]:
        """(number of the keyed view, unit predictions of the others (V-1, N, D))."""
        assert out.predictions is not None
        return other_views(normalize(out.predictions, dim=-1), 2)
