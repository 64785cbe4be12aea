"""The random numbers of a forward, so that a second forward drops the same units and paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """State of the generators that a module on `device` draws from."""

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def now(cls, device: torch.device) -> Noise:
        on_gpu = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
        return cls(device, (torch.get_rng_state(), *on_gpu))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators start from this state; afterwards they are where they were.

        >>> noise = Noise.now(torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> with noise.replayed():
        ...     torch.equal(first, torch.rand(3))
        True
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self.states[0])
            for state in self.states[1:]:
                torch.cuda.set_rng_state(state, self.device)
            yield
