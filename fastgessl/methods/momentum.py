"""What BYOL, MoCo, MoCo v3 and DINO share: a momentum encoder, a copy of the trained weights that follows
them slowly and sees the two views of full size.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from fastgessl.config import MethodConfig
from fastgessl.methods.base import Outputs, ProjectedMethod, RunFacts
from fastgessl.models import apply_head, encode
from fastgessl.schedules import half_cosine

Module = TypeVar("Module", bound=nn.Module)


def momentum_copy(module: Module) -> Module:
    """A copy with weights and buffers of its own that asks for no gradient and has no stochastic depth.

    >>> any(weight.requires_grad for weight in momentum_copy(nn.Linear(2, 2)).parameters())
    False
    """
    copy = deepcopy(module).requires_grad_(False)
    for part in copy.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
    return copy


@torch.no_grad()
def follow(copies: Iterable[nn.Module], online: Iterable[nn.Module], momentum: float) -> None:
    """ξ ← m ξ + (1 - m) θ, weight by weight. Batch-norm statistics are not averaged: the momentum encoder
    makes its own.

    He et al., "Momentum Contrast", CVPR 2020, eq. (2).

    >>> online = nn.Linear(1, 1)
    >>> copy = momentum_copy(online)
    >>> _ = nn.init.constant_(copy.weight, 0.0), nn.init.constant_(online.weight, 1.0)
    >>> follow([copy], [online], 0.75)
    >>> copy.weight.item()
    0.25
    """
    averages: list[Tensor] = [weight for module in copies for weight in module.parameters()]
    torch._foreach_lerp_(
        averages, [weight for module in online for weight in module.parameters()], 1 - momentum
    )


class MomentumMethod(ProjectedMethod):
    """Base of a method with a momentum encoder: slow copies `momentum_<part>` of the parts in `followed`.

    A subclass builds its parts, then calls `copy_parts`. What it overrides of `update_state` ends with
    `super().update_state`.
    """

    views_per_sample = 2
    multi_crop = True
    compares_images = False
    followed: tuple[str, ...] = ("backbone", "projector")
    momentum_backbone: nn.Module
    momentum_projector: nn.Module

    def copy_parts(self, config: MethodConfig, facts: RunFacts) -> None:
        """Copy what is followed, and plan the momentum of every step of the run."""
        for part in self.followed:
            setattr(self, f"momentum_{part}", momentum_copy(getattr(self, part)))
        self.momentum = half_cosine(config.momentum_start, config.momentum_end, facts.total_steps).tolist()

    def momentum_projections(self, views: Sequence[Tensor]) -> Tensor:
        """Views -> the momentum encoder's projections (V, N, D), with the batch statistics of these views."""
        return apply_head(self.momentum_projector, encode(self.momentum_backbone, views))

    @torch.no_grad()
    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """The momentum encoder follows with the momentum of `step`."""
        follow(
            [getattr(self, f"momentum_{part}") for part in self.followed],
            [getattr(self, part) for part in self.followed],
            self.momentum[step],
        )
