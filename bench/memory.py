"""Peak bytes of a computation's live tensors, counted without a GPU's allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveStorages(TorchDispatchMode):
    """Counts the storage of every tensor that an operation returns, forward or backward, from its birth to
    its death.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self._live)
        return returned

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave out what was there before, though a view of it may be returned."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._live += storage.nbytes()
            weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._live -= size


def peak_bytes(step: Callable[[], object], module: torch.nn.Module) -> int:
    """Largest number of bytes that tensors born inside `step` hold at once; the module's own parameters and
    buffers are not counted.

    Scratch memory inside a kernel is not seen, nor what an allocator wastes.

    >>> layer = torch.nn.Linear(4, 4, bias=False)
    >>> peak_bytes(lambda: layer(torch.ones(2, 4)), layer)  # ones (2, 4) and the output (2, 4), float32
    64
    """
    with _LiveStorages() as live:
        for tensor in (*module.parameters(), *module.buffers()):
            live.ignore(tensor)
        step()
    return live.peak
