"""Measure the memory that a computation takes: as the device gave it, or as its live tensors held it."""

import ctypes
import re
import weakref
from collections.abc import Callable
from pathlib import Path
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


def device_peak_bytes(work: Callable[[], object]) -> int | None:
    """Most bytes that `work` takes beyond what is held before it, once something like it has warmed up: of
    PyTorch's allocator on a GPU, of this process's resident memory on a CPU. None where Linux does not tell.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        work()
        return None
    # What was freed goes back to the system, and the peak starts again from what is resident now.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
