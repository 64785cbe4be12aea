"""SwAV: predict a view's balanced assignment to prototypes from another view.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020, eq.
(1) to (3), and its code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.distributed import world_size
from fastgessl.kernels import sinkhorn_potentials, swapped_cross_entropy
from fastgessl.kernels.collectives import rank_and_size
from fastgessl.methods.base import Outputs, ProjectedMethod, RunFacts, Similarity, check_prototypes, register
from fastgessl.methods.queue import check_queue, enqueued
from fastgessl.models import Projector, apply_head, encode, feature_width


@dataclass(frozen=True)
class Codes:
    """The assignment of view i's image n, in factors: softmax over j of rows_in · prototypes_j / ε +
    potentials_ij.
    """

    rows: Tensor
    """(2, N, D)."""
    prototypes: Tensor
    """(K, D)."""
    potentials: Tensor
    """(2, K)."""


@register("swav")
class SwAV(ProjectedMethod):
    """Two views and, if asked for, smaller ones; a projector, and prototypes of unit length. State: a queue
    of projections, one a view.

    Codes come from the two views of full size, balanced over the images of all ranks and the queue, and are
    constant through GeSSL's inner loop, as a momentum encoder's outputs are.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> from fastgessl.config import SwavConfig
    >>> own = SwavConfig(prototypes=32, queue_length=0)
    >>> config = MethodConfig(name="swav", projector_hidden=16, projector_out=4, swav=own)
    >>> method = SwAV(config, backbone, RunFacts())
    >>> views = [torch.randn(5, 3, size, size) for size in (2, 2, 2)]
    >>> out = method(views)
    >>> tuple(out.projections.shape), tuple(out.prototypes.shape)
    ((3, 5, 4), (32, 4))
    >>> tuple(method.loss(out, method.targets(views)).shape)
    ()
    """

    views_per_sample = 2
    multi_crop = True
    queue: Tensor | None

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        check_prototypes("method.swav.prototypes", config.swav.prototypes, facts)
        check_queue("method.swav.queue_length", config.swav.queue_length, facts)
        self.projector = Projector(feature_width(backbone), config.projector_hidden, config.projector_out)
        self.prototypes = nn.Parameter(
            normalize(torch.randn(config.swav.prototypes, config.projector_out), dim=-1)
        )
        self.epsilon, self.iterations = config.swav.sinkhorn_epsilon, config.swav.sinkhorn_iterations
        self.frozen_steps = round(config.swav.freeze_epochs * facts.steps_per_epoch)
        self.queue_start = round(config.swav.queue_start_epoch * facts.steps_per_epoch)
        self.queue_length = config.swav.queue_length
        self.register_buffer(
            "queue",
            torch.zeros(2, config.swav.queue_length, config.projector_out)
            if config.swav.queue_length
            else None,
        )
        self.queued = 0

    def get_extra_state(self) -> Tensor:
        """How many rows entered the queue since queue_start_epoch. No buffer: asking a GPU for it would make
        every step wait.
        """
        return torch.tensor(self.queued)

    def set_extra_state(self, state: Tensor) -> None:
        self.queued = int(state)

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Views, or their features (V, N, F) -> unit projections (V, N, D) and the prototypes."""
        features = encode(self.backbone, views, features)
        # The optimiser writes to the parameter; what was computed with it must keep its value.
        return Outputs(
            features,
            normalize(apply_head(self.projector, features), dim=-1),
            prototypes=self.prototypes.clone(),
        )

    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor | None:
        """The queue (2, L, D) as it is now; None until it is full."""
        return self.queue if self.queued == self.queue_length else None

    def settle(self, out: Outputs, aux: Any = None) -> Codes:
        """The codes of these outputs (`aux`: the queue or None), or `aux` if it holds codes already."""
        if isinstance(aux, Codes):
            return aux
        assert out.prototypes is not None
        rows, prototypes = out.projections[: self.views_per_sample].detach(), out.prototypes.detach()
        rank, size = rank_and_size(self.group)
        # Every rank has the whole queue and brings its share of it, so that no row counts twice.
        balanced = rows if aux is None else torch.cat([rows, aux[:, rank::size].to(rows)], dim=1)
        how: dict[str, Any] = {"epsilon": self.epsilon, "iterations": self.iterations, "group": self.group}
        return Codes(
            rows, prototypes, torch.stack([sinkhorn_potentials(view, prototypes, **how) for view in balanced])
        )

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """-Σ_j q_j log p_j of the code q of one view and the prediction p = softmax(z·cᵀ/τ) of another,
        averaged over predicting views and then over coded ones. Returns ()."""
        codes = self.settle(out, aux)
        assert out.prototypes is not None
        return swapped_cross_entropy(
            out.projections,
            out.prototypes,
            codes.rows,
            codes.prototypes,
            temperature=self.temperature,
            teacher_temperature=self.epsilon,
            teacher_biases=codes.potentials,
        )

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task: the softmax of every view over the prototypes."""
        assert out.prototypes is not None
        return (Similarity(out.projections.flatten(0, 1), out.prototypes, self.temperature),)

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """The prototypes, in the first epochs."""
        return (self.prototypes,) if step < self.frozen_steps else ()

    @torch.no_grad()
    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """Prototypes return to unit length; the queue takes in the projections of all ranks, and counts them
        from its first epoch on.
        """
        self.prototypes.copy_(normalize(self.prototypes, dim=-1))
        if self.queue is None:
            return
        for out, _ in passes:
            rows = out.projections[: self.views_per_sample]
            self.queue = enqueued(self.queue, rows)
            if step >= self.queue_start:
                self.queued = min(self.queued + rows.shape[1] * world_size(), self.queue_length)
