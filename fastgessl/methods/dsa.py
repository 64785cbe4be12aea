"""DSA, the Dynamic Semantic Adjuster: a regulator over any method with two views, which draws alike images
together and others apart.

Song et al., "On the Discriminability of Self-Supervised Representation Learning", arXiv 2407.13541. What the
public code does otherwise than its paper (the pairs of the two mixed blocks, a helper network trained with
labels) is not repeated; docs/methods.md lists it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import normalize

from fastgessl.config import DsaConfig, UsageError
from fastgessl.distributed import world_group, world_size
from fastgessl.kernels.collectives import all_gather_rows, all_reduce_mean, rank_and_size
from fastgessl.methods.base import Method, Outputs, RunFacts, Similarity
from fastgessl.methods.momentum import follow, momentum_copy
from fastgessl.methods.pairwise import mean_absolute_difference, pairwise_scores
from fastgessl.models import at_least_float32, encode
from fastgessl.models.frozen import frozen_network

# Pairs of views whose images are compared: within the first, within the second, and across, in both orders.
BLOCKS = ((0, 0), (1, 1), (0, 1), (1, 0))


@dataclass(frozen=True, kw_only=True)
class RegulatedOutputs(Outputs):
    """The method's outputs, and the discriminator's weights at this forward."""

    difference_weight: Tensor
    """(H, D), its first layer, over the difference of two projections."""
    difference_bias: Tensor
    """(H,)."""
    score_weight: Tensor
    """(1, H), its second layer."""
    score_bias: Tensor
    """(1,)."""


@dataclass(frozen=True)
class RegulatedTargets:
    """The method's targets, and what the helper network sees in the two views."""

    method: Any
    helper: Tensor
    """(2, N, F), of unit length."""


class DSA(Method):
    """L + λ1 · log(1 + mean exp(s_i d_ij (2 M_ij - 1) / T)) + λ2 · mean_b ‖M_b - M°_b‖_F over the four pairs
    of views b.

    The mean is over b and all N² pairs of images; a view of an image against itself counts 0 in it, where the
    formula has exp(0) = 1. d_ij: distance of two normalised projections. M_ij in (0, 1): a discriminator's
    belief that they are alike, an MLP of their difference. M°_ij = exp(-‖y_i - y_j‖ / τ): what the helper
    network y believes. s_i: how many of image i's neighbours are good ones, so that an outlier moves nothing
    (`inlier_weights`). State: that of the method and, if it is the helper, a slow copy of the encoder.

    >>> from fastgessl.config import MethodConfig
    >>> from fastgessl.methods.base import build_method
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> simclr = build_method(MethodConfig(projector_hidden=16, projector_out=4), backbone, RunFacts())
    >>> method = DSA(DsaConfig(weight=1.0, neighbours=3), simclr, RunFacts(images_per_forward=8), view_size=2)
    >>> views = [torch.randn(8, 3, 2, 2), torch.randn(8, 3, 2, 2)]
    >>> out, targets = method(views), method.targets(views)
    >>> sorted(method.measures(out, targets))
    ['dsa_inlier_weight', 'dsa_prior', 'dsa_separation']
    """

    def __init__(self, config: DsaConfig, method: Method, facts: RunFacts, view_size: int):
        super().__init__()
        _check(config, method, facts)
        self.method, self.config = method, config
        width = _projection_width(method, facts, view_size)
        self.difference_layer, self.score_layer = (
            nn.Linear(width, config.discriminator_hidden),
            nn.Linear(config.discriminator_hidden, 1),
        )
        self.follows = config.helper == "momentum"
        self.helper = (
            momentum_copy(method.backbone)
            if self.follows
            else frozen_network(config.helper, config.helper_weights, view_size)
        )
        self.views_per_sample, self.multi_crop = method.views_per_sample, method.multi_crop
        self.compares_all = facts.negatives != "local"
        self.gathers = method.gathers or self.compares_all

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The encoder that the method trains."""
        return self.method.backbone

    def check_views(self, views: Sequence[Tensor], labels: Tensor | None = None) -> None:
        self.method.check_views(views, labels)

    def train(self, mode: bool = True) -> "DSA":
        """A helper network of its own stays as it came; a slow copy of the encoder makes batch statistics as
        BYOL's does.
        """
        super().train(mode)
        if not self.follows:
            self.helper.eval()
        return self

    def forward(
        self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None
    ) -> RegulatedOutputs:
        """The method's forward."""
        return RegulatedOutputs(
            **vars(self.method(views, features=features)),
            difference_weight=self.difference_layer.weight,
            difference_bias=self.difference_layer.bias,
            score_weight=self.score_layer.weight,
            score_bias=self.score_layer.bias,
        )

    @torch.no_grad()
    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> RegulatedTargets:
        """The method's targets, and the helper's features of the two views."""
        seen = at_least_float32(encode(self.helper, views[:2]))
        return RegulatedTargets(self.method.targets(views, labels), normalize(seen, dim=-1))

    def settle(self, out: Outputs, aux: Any = None) -> RegulatedTargets:
        """`targets` with the method's settled; what the helper sees is constant already."""
        return replace(aux, method=self.method.settle(out, aux.method))

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """The method's loss plus the two terms. Returns (); the terms are the same on every rank where they
        compare all ranks' images.
        """
        separation, prior, _ = self._terms(out, aux.helper)
        return (
            self.method.loss(out, aux.method)
            + self.config.weight * separation
            + self.config.prior_weight * prior
        )

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """The method's π."""
        return self.method.similarity(out, aux.method)

    def measures(self, out: Outputs, aux: Any = None) -> dict[str, Tensor]:
        """The method's, the two terms without their weights, and the mean of s."""
        separation, prior, inliers = self._terms(out, aux.helper)
        terms = {"dsa_separation": separation, "dsa_prior": prior, "dsa_inlier_weight": inliers.mean()}
        return self.method.measures(out, aux.method) | terms

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """The method's."""
        return self.method.frozen(step)

    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """The method's state, and the slow copy of the encoder."""
        self.method.update_state([(out, aux.method) for out, aux in passes], step)
        if self.follows:
            follow([self.helper], [self.backbone], self.config.helper_momentum)

    def _terms(self, out: Outputs, helper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(separation (), prior (), s (n,)) of this rank's n images against the N compared."""
        assert isinstance(out, RegulatedOutputs)
        group = world_group() if self.compares_all else None
        everyone, seen = _gathered(out.projections[:2], group), _gathered(helper, group)
        rank, _ = rank_and_size(group)
        own = slice(rank * helper.shape[1], (rank + 1) * helper.shape[1])
        inliers = inlier_weights(seen.mean(0), self.config.neighbours, self.config.good_paths)[own].to(
            everyone.dtype
        )
        energies, errors = [], []
        for one, other in BLOCKS:
            believed = self._believed(out, everyone[one], everyone[other], own)
            exponent = (
                inliers[:, None]
                * _distances(everyone[one, own], everyone[other])
                * (2 * believed - 1)
                / self.config.temperature
            )
            energies.append(_without_self(exponent.exp(), own, one == other).mean())
            prior = (-_distances(seen[one, own], seen[other]) / self.config.prior_temperature).exp()
            errors.append((believed - prior).square().sum())
        separation = all_reduce_mean(torch.stack(energies).mean(), group).log1p()
        errors_of_all = all_reduce_mean(torch.stack(errors), group) * rank_and_size(group)[1]
        return separation, errors_of_all.sqrt().mean(), inliers

    def _believed(self, out: RegulatedOutputs, rows: Tensor, columns: Tensor, own: slice) -> Tensor:
        """M of this rank's rows (n, N): the discriminator on differences whose mean absolute value is 1 in
        every dimension.
        """
        spread = mean_absolute_difference(rows, columns).clamp_min(1e-12)
        first = (rows[own] / spread) @ out.difference_weight.T + out.difference_bias
        second = (columns / spread) @ out.difference_weight.T
        return (pairwise_scores(first, second, out.score_weight[0]) + out.score_bias).sigmoid()


@torch.no_grad()
def inlier_weights(features: Tensor, neighbours: int, good_paths: int) -> Tensor:
    """s (N,) in [0, 1] of images with `features` (N, F): the share of an image's `neighbours` that are good
    ones.

    With A_il = [l is among i's nearest], neighbour j of i is good if more than `good_paths` of j's nearest
    have i among theirs: (A²)_ji. UsageError unless there are more images than neighbours.

    >>> three = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    >>> inlier_weights(torch.cat([three, torch.tensor([[-1.0, 0.0]])]), 2, 0).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    _check_neighbours(neighbours, len(features))
    unit = normalize(features, dim=1)
    alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
    adjacent = torch.zeros_like(alike).scatter_(1, alike.topk(neighbours, dim=1).indices, 1.0)
    good = good_paths < (adjacent @ adjacent).T
    return (adjacent * good).sum(1) / neighbours


def _gathered(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """(2, n, D) of every rank -> (2, N, D)."""
    return all_gather_rows(rows.transpose(0, 1), group, "projections").transpose(0, 1)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """‖x_i - y_j‖ of normalised rows: (n, D), (N, D) -> (n, N). The root's slope at 0 is cut off at a
    distance of 1e-3.
    """
    cosines = normalize(rows, dim=1) @ normalize(columns, dim=1).T
    return (2 - 2 * cosines).clamp_min(1e-6).sqrt()


def _without_self(energy: Tensor, own: slice, same_view: bool) -> Tensor:
    """(n, N) with 0 where a view is compared with itself."""
    if not same_view:
        return energy
    places = torch.arange(energy.shape[1], device=energy.device)
    return energy.masked_fill(places[own, None] == places, 0.0)


def _check(config: DsaConfig, method: Method, facts: RunFacts) -> None:
    if method.needs_labels or facts.global_views < 2:
        raise UsageError(
            f"dsa.weight {config.weight:g} regulates a self-supervised method with two views of full size, "
            "and this is "
            f"{type(method).__name__} with {facts.global_views}. Set --dsa.weight 0, or take another method."
        )
    alone = facts.negatives == "local" or facts.bi_level
    images = facts.images_per_forward // (world_size() if alone else 1)
    compared = (
        " (in GeSSL's inner steps those of one process)"
        if facts.bi_level and facts.negatives != "local"
        else ""
    )
    _check_neighbours(config.neighbours, images, compared)


def _check_neighbours(neighbours: int, images: int, compared: str = "") -> None:
    if images <= neighbours:
        raise UsageError(
            f"dsa.neighbours {neighbours} are chosen among the images that are compared{compared}, and "
            f"there are {images}. "
            f"Raise --train.batch_size, or lower --dsa.neighbours below {images}."
        )


def _projection_width(method: Method, facts: RunFacts, view_size: int) -> int:
    """D of the method's projections, seen in a forward of two black images that leaves no trace. UsageError
    if a view has none.
    """
    parameter = next(method.parameters())
    mode = method.training
    views = [
        torch.zeros(2, 3, view_size, view_size, dtype=parameter.dtype, device=parameter.device)
    ] * facts.global_views
    with torch.no_grad():
        projected, _, width = method.eval()(views).projections.shape
    method.train(mode)
    if projected < facts.global_views:
        raise UsageError(
            f"dsa compares the projections of two views of full size, and {type(method).__name__} projects "
            f"{projected} of "
            f"{facts.global_views} with these settings. Set --method.moco.symmetric True, or --dsa.weight 0."
        )
    return width
