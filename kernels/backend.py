"""Which implementation computes a loss: the dense reference, row-chunked PyTorch, or Triton."""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "chunked", "triton")
ENVIRONMENT = "FASTGESSL_KERNELS"
SMALL_TABLE = 1 << 20
"""Entries up to which a CPU computes fastest on the stored table: at 1,024 x 1,024 it took 0.80 of the
chunked time, at 2,048 1.1 times.

On a GPU none is stored: forward and backward of the kernels ask it for fewer operations (float32: InfoNCE 12,
the stored table 15; CLIP 19 and 23; σ 13 and 23), which tests count. Whether that is also faster at a few
hundred rows, where the host's own time counts, waits for a measurement on a GPU."""
OLDEST_ARCHITECTURE = (8, 0)
BLACKWELL, OLDEST_TRITON_FOR_BLACKWELL = (10, 0), (3, 3)
"""Triton 3.2 ends the process with a failed assertion when it compiles for compute capability 10."""


def triton_version() -> str:
    """That of the module: its distribution may have another name (pytorch-triton, triton-windows), under
    which no metadata is found.
    """
    import triton

    return triton.__version__


def _triton_release() -> tuple[int, ...]:
    return tuple(int(part) for part in triton_version().split(".")[:2])


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
    elif (
        torch.cuda.get_device_capability(index) >= BLACKWELL
        and _triton_release() < OLDEST_TRITON_FOR_BLACKWELL
    ):
        obstacle = f"{torch.cuda.get_device_name(index)} needs triton 3.3 or newer, found {triton_version()}"
    if obstacle:
        warnings.warn(f"fastgessl.kernels runs as chunked PyTorch on this GPU: {obstacle}.", stacklevel=4)
    return obstacle


def triton_obstacle(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot take `tensor`; None if they can. Under TRITON_INTERPRET=1 they take CPU
    tensors, slowly.
    """
    if tensor.dtype == torch.float64:
        return "float64 has no matrix instructions there"
    if tensor.is_cuda:
        return _device_obstacle(tensor.get_device())
    if (
        tensor.device.type == "cpu"
        and os.environ.get("TRITON_INTERPRET") == "1"
        and importlib.util.find_spec("triton") is not None
    ):
        return None
    return f"a {tensor.device.type} tensor"


def implementation_for(
    tensor: Tensor, implementation: str | None = None, entries: float = math.inf
) -> tuple[str, str]:
    """The implementation that a loss on `tensor` uses for a table of `entries` similarities, and why:

    the argument, else the environment variable FASTGESSL_KERNELS, else the best that works. A small table is
    stored on a CPU, because that is faster, and on a GPU not: by the number of operations the kernels have
    the better of it, which is not yet measured. Without `entries` the answer is that for a large one.

    Raises ValueError for an unknown name and for a choice that cannot run.

    >>> import torch
    >>> implementation_for(torch.zeros(2, 3), "reference")
    ('reference', 'implementation="reference" was given')
    """
    wanted, source = implementation, f'implementation="{implementation}" was given'
    if wanted is None:
        wanted, source = (
            os.environ.get(ENVIRONMENT) or None,
            f"the environment variable {ENVIRONMENT} says so",
        )
    if wanted is not None and wanted not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {wanted!r} ({source}). Choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    obstacle = triton_obstacle(tensor)
    if wanted == "triton" and obstacle:
        raise ValueError(
            f"the Triton kernels cannot be used, though {source}: {obstacle}. Choose chunked or reference."
        )
    if wanted is not None:
        return wanted, source
    # Compiled code takes the opaque operators: the dense path's checks of values would break the graph.
    if tensor.device.type == "cpu" and entries <= SMALL_TABLE and not torch.compiler.is_compiling():
        return "reference", f"on a CPU a table of {entries:,} entries is faster stored"
    if obstacle:
        return "chunked", obstacle
    return (
        ("triton", f"a CUDA tensor of {tensor.dtype}")
        if tensor.is_cuda
        else ("chunked", "the interpreter is for tests")
    )


def dense(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The reference in its own precision, whatever autocast says."""
    device = arguments[0].device.type
    if not torch.is_autocast_enabled(device):
        return function(*arguments)
    with torch.autocast(device, enabled=False):
        return function(*arguments)
