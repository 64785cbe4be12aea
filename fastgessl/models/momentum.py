"""The momentum encoder: a copy of the trained weights that follows them slowly."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import TypeVar

import torch
from timm.layers import DropPath
from torch import nn

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
    averages: list[torch.Tensor] = [weight for module in copies for weight in module.parameters()]
    torch._foreach_lerp_(
        averages, [weight for module in online for weight in module.parameters()], 1 - momentum
    )
