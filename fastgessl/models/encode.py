"""Views through a network: as few forwards as there are sizes, and results in the full precision that losses
need.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from fastgessl.config import UsageError


def encode(backbone: nn.Module, views: Sequence[Tensor] | None, features: Tensor | None = None) -> Tensor:
    """V views, each (N, 3, S, S), -> features (V, N, F); or `features` themselves, where they are known
    already.

    Neighbouring views of one size share a forward of V·N rows and its batch norm. Raises ValueError if
    neither is given.

    >>> encode(torch.nn.Flatten(), [torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)]).shape
    torch.Size([2, 4, 12])
    """
    if features is not None:
        return features
    if not views:
        raise ValueError(
            "a method was given neither views nor features. Pass a list of views (N, 3, S, S), or their "
            "features (V, N, F)."
        )
    rows = [backbone(torch.cat(list(same))) for _, same in groupby(views, key=lambda view: view.shape)]
    return torch.cat(rows).unflatten(0, (len(views), -1))


def apply_head(head: nn.Module, rows: Tensor) -> Tensor:
    """A head on all views at once: (V, N, F) -> (V, N, D), at least float32: a KL under 1e-3 is noise in
    bfloat16.

    >>> apply_head(torch.nn.Linear(12, 5), torch.zeros(2, 4, 12)).shape
    torch.Size([2, 4, 5])
    """
    out = head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


def feature_width(backbone: nn.Module) -> int:
    """F of `encode`: the backbone's `num_features`. Raises UsageError if it has none."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise UsageError(
            f"the backbone {type(backbone).__name__} has no integer num_features. Set it to the width of "
            "the backbone's output."
        )
    return width
