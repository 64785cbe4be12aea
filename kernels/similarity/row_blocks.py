"""The blocks of rows in which the chunked implementation goes through a table of similarities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits of one block, 1 MiB of float32, stay in the cache of a core; blocks of fewer rows starve the matmuls
# (bench/test_losses.py).
BLOCK_ELEMENTS = 1 << 18
# On a GPU, 64 MiB of float32, so that an operation on a block lasts longer than its launch; not yet measured
# on one. At most 17 blocks are held at once (second order with a teacher that moves; InfoNCE's second order
# 7, backward 5): 1.1 GiB, in float64 2.1.
GPU_BLOCK_ELEMENTS = 1 << 24
BLOCK_ROWS = 128


def rows_of_block(columns: int, device: torch.device) -> int:
    """Rows of a block of logits (rows, columns): as many as its number of elements allows, and at least
    BLOCK_ROWS.
    """
    return max(BLOCK_ROWS, (BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS) // columns)


def row_blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """The rows of query (M, D) block by block, for a table with key (N, D).

    >>> [(rows.start, rows.stop) for rows in row_blocks(torch.empty(300, 4), torch.empty(4096, 4))]
    [(0, 128), (128, 256), (256, 300)]
    """
    rows, step = len(query), rows_of_block(len(key), query.device)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
