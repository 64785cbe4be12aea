"""MoCo v2 and v2+: recognise an image's momentum-encoded other view among a queue of earlier ones.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, eq. (1); Chen et
al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297; v2+: both views are queries,
as in solo-learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from fastgessl.config import MethodConfig, UsageError
from fastgessl.distributed import world_group
from fastgessl.kernels import similarity_logsumexp
from fastgessl.kernels.collectives import all_gather_rows, rank_and_size
from fastgessl.kernels.prototypes import other_views
from fastgessl.methods.base import Outputs, RunFacts, Similarity, register
from fastgessl.methods.momentum import MomentumMethod
from fastgessl.methods.queue import check_queue, enqueued
from fastgessl.models import (
    PlainProjector,
    apply_head,
    feature_width,
)


@dataclass(frozen=True)
class Keys:
    """What queries are compared with. Views G: both, or the second alone if only the first is a query."""

    positive: Tensor
    """(G, N, D), the momentum encoder's unit projections of this batch."""
    queue: Tensor
    """(G, L, D), those of earlier batches, the negatives."""


@register("moco")
class MoCo(MomentumMethod):
    """Two views and, if asked for, smaller ones. State: the momentum encoder, and a queue of its projections,
    one a view.

    Queries of every other view meet the key of a view and that view's queue. In the asymmetric v2 the second
    view is key only.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> from fastgessl.config import MocoConfig
    >>> own = MocoConfig(queue_length=20)
    >>> config = MethodConfig(name="moco", projector_hidden=16, projector_out=4, moco=own)
    >>> method = MoCo(config, backbone, RunFacts(total_steps=100, images_per_forward=5))
    >>> views = [torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)]
    >>> out, keys = method(views), method.targets(views)
    >>> tuple(out.projections.shape), tuple(keys.positive.shape), tuple(keys.queue.shape)
    ((2, 5, 4), (2, 5, 4), (2, 20, 4))
    >>> tuple(method.loss(out, keys).shape)
    ()
    """

    queue: Tensor

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        if config.moco.queue_length == 0:
            raise UsageError(
                "method.moco.queue_length is 0, and MoCo's negatives come from the queue. Set it above 0, or "
                "take mocov3."
            )
        check_queue("method.moco.queue_length", config.moco.queue_length, facts)
        self.projector = PlainProjector(
            feature_width(backbone), config.projector_hidden, config.projector_out
        )
        self.copy_parts(config, facts)
        self.symmetric, self.shuffles = config.moco.symmetric, config.moco.shuffle_batch_norm
        queues = 2 if self.symmetric else 1
        self.register_buffer(
            "queue", normalize(torch.randn(queues, config.moco.queue_length, config.projector_out), dim=-1)
        )

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Views, or their features (V, N, F) -> the queries' projections (V, N, D); V leaves out a view that
        is key only.
        """
        if views is not None and not self.symmetric:
            views = [views[0], *views[2:]]
        return super().forward(views, features=features)

    @torch.no_grad()
    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Keys:
        """Keys and the queue as it is now."""
        keys = views[:2] if self.symmetric else views[1:2]
        if self.shuffles:
            features = shuffled_over_ranks(self.momentum_backbone, torch.cat(list(keys)))
            projections = apply_head(self.momentum_projector, features.unflatten(0, (len(keys), -1)))
        else:
            projections = self.momentum_projections(keys)
        return Keys(normalize(projections, dim=-1), self.queue)

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """-log( exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ_queue exp(q·k/τ)) ), averaged over queries and then over keyed
        views. Returns ().
        """
        terms = []
        for keyed, queries in self._queries(out):
            positive = (queries * aux.positive[keyed]).sum(-1).flatten() / self.temperature
            negatives = similarity_logsumexp(
                queries.flatten(0, 1), aux.queue[keyed], temperature=self.temperature
            )
            terms.append(-logsigmoid(positive - negatives).mean())
        return torch.stack(terms).mean()

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task: queries over the momentum encoder's projections of another view, for each keyed
        view.
        """
        return tuple(
            Similarity(queries.flatten(0, 1), aux.positive[keyed], self.temperature)
            for keyed, queries in self._queries(out)
        )

    def _queries(self, out: Outputs) -> list[tuple[int, Tensor]]:
        """(number of the keyed view, unit queries of the others (Q, N, D))."""
        queries = normalize(out.projections, dim=-1)
        return other_views(queries, 2) if self.symmetric else [(0, queries)]

    @torch.no_grad()
    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """All ranks' keys enter the queue, micro-batch by micro-batch; the momentum encoder follows with the
        momentum of `step`.
        """
        for _, keys in passes:
            self.queue = enqueued(self.queue, keys.positive)
        super().update_state(passes, step)


@torch.no_grad()
def shuffled_over_ranks(network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Shuffled batch norm: network(rows) (N, F), computed on rows (N, ...) that were dealt out at random
    among all ranks and collected again.

    A rank's rows are then normalised among rows of other ranks, so that statistics do not give away who
    belongs together. He et al., CVPR 2020, section 3.3. Alone (one process, or inside
    `fastgessl.distributed.rank_local`) it is network(rows). No gradient.

    >>> shuffled_over_ranks(torch.nn.Flatten(), torch.ones(4, 2, 3)).shape
    torch.Size([4, 6])
    """
    group = world_group()
    if group is None:
        return network(rows)
    rank, size = rank_and_size(group)
    everyone = all_gather_rows(rows, group)
    order = torch.randperm(len(everyone)).to(rows.device)
    dist.broadcast(order, 0, group=group)
    dealt = network(everyone[order.chunk(size)[rank]])
    back = order.argsort().chunk(size)[rank]
    return all_gather_rows(dealt, group)[back]
