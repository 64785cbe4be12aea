"""Which ranks a collective spans. Collectives with backwards that are right at every order:
`fastgessl.kernels.collectives`.

The convention of the whole project: each rank backpropagates the loss of its own rows, and gradients are
averaged over ranks (DDP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

_ALONE: ContextVar[bool] = ContextVar("rank_local", default=False)


@contextmanager
def rank_local() -> Iterator[None]:
    """Inside, this rank is a world of its own: batch norm uses its own rows and losses its own negatives.

    GeSSL's inner loop runs here, because a task belongs to one rank and every rank may hold weights of its
    own.

    >>> with rank_local():
    ...     world_size(), world_group()
    (1, None)
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_group() -> dist.ProcessGroup | None:
    """The process group of all ranks; None where there is one process only, and inside `rank_local`."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def world_size() -> int:
    """How many ranks `world_group` spans: 1 where it is None."""
    return 1 if world_group() is None else dist.get_world_size()
