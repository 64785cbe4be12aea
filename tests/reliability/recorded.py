"""One of any number of ranks in one process: what it sends is written down and goes nowhere, by torch's own
fake process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore


class Call(NamedTuple):
    """One collective, and the bytes that this rank puts in."""

    name: str
    nbytes: int


def _sent(operations: list[dist.P2POp], rank: int) -> list[Call]:
    """Who is sent what; every send has a receive of its size."""
    sent = [operation for operation in operations if operation.op is dist.isend]
    received = [operation for operation in operations if operation.op is dist.irecv]
    assert [tuple(one.tensor.shape) for one in sent] == [tuple(one.tensor.shape) for one in received]
    size = dist.get_world_size()
    assert {one.peer for one in sent} <= {(rank + 1) % size} and {one.peer for one in received} <= {
        (rank - 1) % size
    }
    for one in received:
        one.tensor.zero_()
    return [Call("pass on", sum(one.tensor.nbytes for one in sent))]


@contextmanager
def recording(rank: int, size: int) -> Iterator[list[Call]]:
    """Inside, this process is rank `rank` of `size`, all of which hold what it holds. The list grows with its
    collectives.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    calls: list[Call] = []

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> None:
        calls.append(Call("all-reduce", tensor.nbytes))
        tensor.mul_(size)

    def all_gather(output: Tensor, given: Tensor, *_: Any, **__: Any) -> None:
        calls.append(Call("all-gather", given.nbytes))
        output.copy_(given.repeat(size, *[1] * (given.dim() - 1)))

    def reduce_scatter(output: Tensor, given: Tensor, *_: Any, **__: Any) -> None:
        calls.append(Call("reduce-scatter", given.nbytes))
        output.copy_(given.chunk(size)[rank] * size)

    def pass_on(operations: list[dist.P2POp]) -> list[Any]:
        calls.extend(_sent(operations, rank))
        return []

    patched = {
        "all_reduce": all_reduce,
        "all_gather_into_tensor": all_gather,
        "reduce_scatter_tensor": reduce_scatter,
        "batch_isend_irecv": pass_on,
    }
    try:
        with mock.patch.multiple(dist, **patched):
            yield calls
    finally:
        dist.destroy_process_group()


def under_ddp(module: nn.Module, calls: list[Call]) -> DistributedDataParallel:
    """The module in DDP, whose own all-reduces of gradient buckets are written down too."""
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)

    def note(state, bucket):  # DDP wants the annotation itself or none, not its text
        calls.append(Call("gradients", bucket.buffer().nbytes))
        summed: torch.futures.Future[Tensor] = torch.futures.Future()
        summed.set_result(bucket.buffer())
        return summed

    wrapped.register_comm_hook(None, note)
    return wrapped
