"""The same weights in a head of ours and in lightly's: outputs and gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_heads_agree(ours: nn.Module, oracle: nn.Module, rows: Tensor) -> None:
    """Copies the weights of `ours` into `oracle`, layer by layer, after they were moved away from where norms
    start.
    """
    with torch.no_grad():
        for found, expected in zip(ours.parameters(), oracle.parameters(), strict=True):
            found.add_(0.3 * torch.randn_like(found))
            expected.copy_(found)
    sides = []
    for head in (ours, oracle):
        given = rows.clone().requires_grad_()
        out = head(given)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        sides.append((out, *torch.autograd.grad((weight * out).sum(), [given, *head.parameters()])))
    for found, expected in zip(*sides, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
