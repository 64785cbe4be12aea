"""What every self-supervised method is: pure functions of an encoder's outputs, and one place where state moves.

A method is a module that owns the backbone, the heads and, if the paper has one, the momentum encoder. `forward`, `targets`, `loss`
and `similarity` may be called many times in one step by GeSSL's inner loop and write nothing except batch-norm statistics in
`forward` and `targets`; `update_state` is called once after the optimiser step and is the only writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """What the encoder says of V views of N images. `predictions` exists for methods with a predictor."""

    features: Tensor
    """(V, N, F), the representation that is kept."""
    projections: Tensor
    """(V, N, D)."""
    predictions: Tensor | None = None
    """(V, N, D)."""


@dataclass(frozen=True)
class Similarity:
    """π of a task: row i of softmax(query·keyᵀ / temperature) says which of the N images view i shows. Both (N, D), normalised."""

    query: Tensor
    key: Tensor
    temperature: float


class Method(nn.Module):
    """Base of all methods. A subclass defines `forward`, `loss` and `similarity`, and `targets` and `update_state` if it keeps a state.

    The kept encoder is the submodule `backbone`; every other trainable parameter belongs to a head. Outputs are float32 or float64, also
    under autocast.
    """

    backbone: nn.Module
    views_per_sample: int | None = None
    """How many views `forward` takes; None if any number will do. The objective checks it."""
    gathers: bool = False
    """Whether `loss` exchanges rows with other ranks (outside `fastgessl.distributed.rank_local`)."""

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Views, a list of V tensors (N, 3, S, S), or their `features` (V, N, F) if only heads run. Moves batch-norm statistics."""
        raise NotImplementedError

    def targets(self, views: Sequence[Tensor]) -> Any:
        """What stays constant through the inner loop, computed without gradient: momentum-encoder outputs, a queue. None by default."""
        return None

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """The method's SSL loss: Outputs and `targets` -> (). Pure."""
        raise NotImplementedError

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task, one `Similarity` a direction, for σ-measurement. Pure."""
        raise NotImplementedError

    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """Advance momentum encoder, queue, centre, once after optimiser step `step`; `passes`: its micro-batches' outputs and targets."""
