"""Between ranks and devices: collectives whose backward is right, and differentiable twice; copies that wait for nothing.

The convention: every rank backpropagates the loss of its own rows, and gradients mean those of the sum of all
ranks' losses. DDP's averaging of local means then gives the gradient of the global mean. So the backward of a
gather is a reduce-scatter (sum), and that of a sum is a sum. Forward mode raises.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(0, 1) without a group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def check_equal_rows(tensor: Tensor, group: dist.ProcessGroup, name: str) -> None:
    """Every rank must hold as many rows: unequal ones would hang or mix up memory inside the collective.

    Raises ValueError on every rank.
    """
    # Filled on the device: a number that is copied there from pageable memory, as by torch.tensor, makes the
    # host wait.
    rows = torch.full((1,), len(tensor), dtype=torch.int64, device=tensor.device)
    found = rows.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(found, rows, group=group)
    message = f"{name} must have as many rows on every rank (drop the last, smaller batch)"
    if tensor.is_cuda:
        # Asynchronous: the assertion stands before the gather on the same stream, and the host need not wait.
        torch._assert_async((found == len(tensor)).all(), message)
    elif (found != len(tensor)).any():
        raise ValueError(f"{message}; found {found.tolist()}.")


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(rows, tensor.contiguous(), group=group)
    return rows


def _summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _reduce_scattered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    rank, size = rank_and_size(group)
    if dist.get_backend(group) == "gloo":
        # gloo sums in the tensor's own dtype and, before torch 2.8, has no reduce-scatter.
        return _summed(tensor, group).chunk(size)[rank].clone()
    rows = tensor.new_empty(len(tensor) // size, *tensor.shape[1:])
    dist.reduce_scatter_tensor(rows, tensor.contiguous(), group=group)
    return rows


TRANSPOSED = {_gathered: _reduce_scattered, _reduce_scattered: _gathered, _summed: _summed}
"""What each collective's backward does with the gradient."""


class _Collective(torch.autograd.Function):
    """A collective of a tensor over a group, differentiable to any order; refuses forward mode."""

    @staticmethod
    def forward(tensor: Tensor, group: dist.ProcessGroup, collective: Callable[..., Tensor]) -> Tensor:
        return collective(tensor, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.collective = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Collective.apply(gradient, ctx.group, TRANSPOSED[ctx.collective]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(
            "fastgessl.kernels: forward mode (jvp, jacfwd, forward_ad) is not implemented across ranks. "
            "Take derivatives in reverse: torch.func.jacrev, or grad of grad for the second order."
        )


def all_gather_rows(tensor: Tensor, group: dist.ProcessGroup | None, name: str = "key") -> Tensor:
    """(N, …) on each of W ranks -> (W·N, …), rank by rank, the same on all. Without a group, the tensor
    itself. Differentiable twice.

    Raises ValueError if the ranks hold unequal numbers of rows.
    """
    if group is None:
        return tensor
    check_equal_rows(tensor, group, name)
    return _Collective.apply(tensor, group, _gathered)


def all_reduce_mean(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean over the ranks, the same on all. Without a group, the tensor itself. Differentiable to any order."""
    if group is None:
        return tensor
    return _Collective.apply(tensor, group, _summed) / dist.get_world_size(group)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. To a GPU it travels through pinned memory, on the current stream, and the host continues
    at once.

    From pageable memory the copy would first wait for everything before it on the stream. The pinned copy is PyTorch's:
    it keeps the memory until the transfer is over and uses it again for the next one.

    >>> to_device(torch.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
