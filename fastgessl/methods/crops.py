"""Multi-crop: what a view is compared with are all the other views of the same image."""

from __future__ import annotations

import torch
from torch import Tensor


def other_views(rows: Tensor, targets: int) -> list[tuple[int, Tensor]]:
    """Each of the first `targets` views by number, with the rows of every other view: rows (V, N, D) ->
    (view, (V-1, N, D)).

    The last comes first, so that of two views the first is compared with the second before the second with
    the first.

    >>> [(view, others.flatten().tolist()) for view, others in other_views(torch.arange(3.0).view(3, 1, 1), 2)]
    [(1, [0.0, 2.0]), (0, [1.0, 2.0])]
    """
    return [(view, torch.cat([rows[:view], rows[view + 1 :]])) for view in reversed(range(targets))]
