"""Shuffled batch norm: a rank's rows are normalised among rows of other ranks, so that statistics do not give
away who belongs together.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgessl.distributed import world_group
from fastgessl.kernels.collectives import all_gather_rows, rank_and_size


@torch.no_grad()
def shuffled_over_ranks(network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """network(rows) (N, F), computed on rows (N, ...) that were dealt out at random among all ranks and
    collected again.

    Alone (one process, or inside `fastgessl.distributed.rank_local`) it is network(rows). No gradient.

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
