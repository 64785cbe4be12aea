"""From the host to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. To a GPU it goes through pinned memory, on the current stream, and the host
    goes on at once.

    From pageable memory the copy would first wait for everything before it on the stream. The pinned copy is
    PyTorch's: it keeps the memory until the transfer is over and uses it again for the next one.

    >>> to_device(torch.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
