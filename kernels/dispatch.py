"""Which implementation computes a loss: the dense reference, row-chunked PyTorch, or Triton."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "chunked", "triton")
ENVIRONMENT = "FASTGESSL_KERNELS"


OLDEST_ARCHITECTURE = (8, 0)


@cache
def _device_obstacle(index: int) -> str | None:
    """Why this CUDA device cannot run the Triton kernels; a device that cannot is reported once."""
    obstacle = None
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif torch.version.hip is not None:
        obstacle = "the kernels are tuned and tested for NVIDIA cards only"
    elif torch.cuda.get_device_capability(index) < OLDEST_ARCHITECTURE:
        obstacle = f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0 and has no bfloat16 matrix instructions"
    if obstacle:
        warnings.warn(f"fastgessl.kernels runs as chunked PyTorch on this GPU: {obstacle}.", stacklevel=4)
    return obstacle


def triton_obstacle(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot take `tensor`; None if they can. Under TRITON_INTERPRET=1 they take CPU tensors, slowly."""
    if tensor.dtype == torch.float64:
        return "float64 has no matrix instructions there"
    if tensor.is_cuda:
        return _device_obstacle(tensor.get_device())
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        return None
    return f"a {tensor.device.type} tensor"


def implementation_for(tensor: Tensor, implementation: str | None = None) -> tuple[str, str]:
    """The implementation that a loss on `tensor` uses, and why:

    the argument, else the environment variable FASTGESSL_KERNELS, else the best that works.

    Raises ValueError for an unknown name and for a choice that cannot run.

    >>> import torch
    >>> implementation_for(torch.zeros(2, 3), "reference")
    ('reference', 'implementation="reference" was given')
    """
    wanted, source = implementation, f'implementation="{implementation}" was given'
    if wanted is None:
        wanted, source = os.environ.get(ENVIRONMENT) or None, f"the environment variable {ENVIRONMENT} says so"
    if wanted is not None and wanted not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {wanted!r} ({source}). Choose one of {', '.join(IMPLEMENTATIONS)}.")
    obstacle = triton_obstacle(tensor)
    if wanted == "triton" and obstacle:
        raise ValueError(f"the Triton kernels cannot be used, though {source}: {obstacle}. Choose chunked or reference.")
    if wanted is not None:
        return wanted, source
    if obstacle:
        return "chunked", obstacle
    return ("triton", f"a CUDA tensor of {tensor.dtype}") if tensor.is_cuda else ("chunked", "the interpreter is for tests")


def as_matmul(*operands: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the operands in the dtype that a matmul would take; their gradients come back in their own."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(operand if operand.dtype == torch.float64 else operand.to(dtype) for operand in operands)


def dense(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The reference in its own precision, whatever autocast says."""
    with torch.autocast(arguments[0].device.type, enabled=False):
        return function(*arguments)
