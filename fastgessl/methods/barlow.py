"""Barlow Twins: make the cross-correlation of two views' embeddings the identity.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, eq. (1) and (2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.kernels.collectives import all_reduce_mean
from fastgessl.methods.base import Outputs, ProjectedMethod, RunFacts, Similarity, register
from fastgessl.models import Projector, feature_width

# Inside batch norm's, which is how the paper's code standardises.
EPSILON = 1e-5


@register("barlow")
class BarlowTwins(ProjectedMethod):
    """Two views and one projector, whose outputs are standardised over the images of all ranks. Keeps no
    state.

    Collectives inside the loss sum their gradients too, so that DDP's mean is the gradient of one process.
    The official code sums the correlation without gradient and so divides every gradient by the number of
    processes, which LARS forgives matrices and not biases.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> from fastgessl.config import BarlowConfig
    >>> own = BarlowConfig(projector_layers=3)
    >>> config = MethodConfig(name="barlow", projector_hidden=16, projector_out=4, barlow=own)
    >>> method = BarlowTwins(config, backbone, RunFacts())
    >>> out = method([torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)])
    >>> tuple(out.projections.shape), tuple(method.loss(out).shape)
    ((2, 5, 4), ())
    """

    views_per_sample = 2

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        width, layers = feature_width(backbone), config.barlow.projector_layers
        self.projector = Projector(width, config.projector_hidden, config.projector_out, layers=layers)
        self.redundancy_weight, self.loss_scale = config.barlow.redundancy_weight, config.barlow.loss_scale

    def loss(self, out: Outputs, aux: None = None) -> Tensor:
        """scale · (Σ_i (1 - C_ii)² + λ Σ_{i≠j} C_ij²), C the cross-correlation (D, D). Returns (), the same
        on every rank.
        """
        on_diagonal, off_diagonal = _terms(self._correlation(out))
        return self.loss_scale * (on_diagonal + self.redundancy_weight * off_diagonal)

    def similarity(self, out: Outputs, aux: None = None) -> Sequence[Similarity]:
        """π of the task: rows whose softmax over the other view's standardised embeddings says which image
        this is, in both directions.
        """
        first, second = normalize(self._standardised(out), dim=-1)
        return Similarity(first, second, self.temperature), Similarity(second, first, self.temperature)

    def measures(self, out: Outputs, aux: None = None) -> dict[str, Tensor]:
        """invariance, the diagonal's term of the loss, and redundancy, λ times the others'; both without the
        scale.
        """
        on_diagonal, off_diagonal = _terms(self._correlation(out))
        return {"invariance": on_diagonal, "redundancy": self.redundancy_weight * off_diagonal}

    def _correlation(self, out: Outputs) -> Tensor:
        first, second = self._standardised(out)
        return all_reduce_mean(first.T @ second / len(first), self.group)

    def _standardised(self, out: Outputs) -> Tensor:
        """(2, N, D) with mean 0 and variance 1 over the images of all ranks, each view and each output for
        itself.
        """
        group, rows = self.group, out.projections
        centred = rows - all_reduce_mean(rows.mean(1, keepdim=True), group)
        variance = all_reduce_mean(centred.square().mean(1, keepdim=True), group)
        return centred * (variance + EPSILON).rsqrt()


def _terms(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i (1 - C_ii)² and Σ_{i≠j} C_ij². Out of place: in place there is no second derivative."""
    diagonal = torch.eye(len(correlation), dtype=torch.bool, device=correlation.device)
    return (1 - correlation.diagonal()).square().sum(), correlation.masked_fill(diagonal, 0.0).square().sum()
