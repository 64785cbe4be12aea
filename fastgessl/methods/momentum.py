"""What BYOL, MoCo, MoCo v3 and DINO share: a momentum encoder that sees the two views of full size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgessl.config import MethodConfig
from fastgessl.methods.base import Method, Outputs, RunFacts
from fastgessl.models import apply_head, encode, follow, momentum_copy
from fastgessl.schedules import cosine_momentum


class MomentumMethod(Method):
    """Base of a method with a momentum encoder: slow copies `momentum_<part>` of the parts in `followed`.

    A subclass builds its parts, then calls `copy_parts`. What it overrides of `update_state` ends with
    `super().update_state`.
    """

    views_per_sample = 2
    multi_crop = True
    followed: tuple[str, ...] = ("backbone", "projector")
    momentum_backbone: nn.Module
    momentum_projector: nn.Module

    def copy_parts(self, config: MethodConfig, facts: RunFacts) -> None:
        """Copy what is followed, and plan the momentum of every step of the run."""
        for part in self.followed:
            setattr(self, f"momentum_{part}", momentum_copy(getattr(self, part)))
        self.momentum = cosine_momentum(
            config.momentum_start, config.momentum_end, facts.total_steps
        ).tolist()

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
