"""A mini-batch as a task: the method's outputs, loss and π as functions of the adapted weights, with every
side effect left behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastgessl.distributed import rank_local
from fastgessl.methods.base import Method, Outputs, Similarity

Weights = dict[str, Tensor]
"""Trainable parameters of a method by name: all of them, or those of the heads."""

# float16 gradients below 6e-8 vanish: GradScaler scales the outer loss, this constant the inner losses. With
# 4096 the second derivatives of narrow test networks overflow already; with 256 they agree with float32 to a
# cosine of 0.9999.
HALF_PRECISION_SCALE = 256.0


@dataclass(frozen=True)
class Noise:
    """State of the generators that a module on `device` draws from."""

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def now(cls, device: torch.device) -> "Noise":
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


@dataclass(frozen=True)
class Task:
    """One rank's mini-batch. `features` (V, N, F) are given when only the heads adapt. Calls move no buffer
    and no random state.
    """

    method: Method
    views: Sequence[Tensor]
    aux: Any
    noise: Noise
    features: Tensor | None = None

    def outputs(self, weights: Weights) -> Outputs:
        """The method at other weights. A weight that is not given keeps its present value."""
        inputs: dict[str, Any] = {**self.inputs} or {"views": self.views}
        with self.noise.replayed():
            return _apart(self.method, "forward", self.views[0].device.type, weights, **inputs)

    def loss(self, out: Outputs) -> Tensor:
        """The SSL loss of this rank's rows alone, in full precision."""
        with rank_local(), full_precision(self.views[0].device.type):
            return self.method.loss(out, self.aux)

    def similarity(self, out: Outputs) -> Sequence[Similarity]:
        """π of the task, in full precision."""
        with rank_local(), full_precision(self.views[0].device.type):
            return self.method.similarity(out, self.aux)

    @property
    def inputs(self) -> Weights:
        """What a gradient may flow to besides the weights: the features, if only the heads adapt."""
        return {} if self.features is None else {"features": self.features}

    @torch.no_grad()
    def settled(self, out: Outputs) -> "Task":
        """The task with all its targets, those included that `out`, its outputs at the present weights,
        determine.
        """
        with rank_local(), full_precision(self.views[0].device.type):
            return replace(self, aux=self.method.settle(out.detached(), self.aux))

    def cut_off(self, *, requires_grad: bool = False) -> "Task":
        """The same task with features that have no past."""
        return (
            self
            if self.features is None
            else replace(self, features=self.features.detach().requires_grad_(requires_grad))
        )


def rank_local_task(
    method: Method, views: Sequence[Tensor], labels: Tensor | None, scope: Literal["all", "head"]
) -> Task:
    """The task of these views with targets and (scope head) features from forwards of its own, in which no
    rank sees another.
    """
    device = views[0].device
    with Noise.now(device).replayed():
        aux = _apart(method, "targets", device.type, {}, views, labels)
        noise = Noise.now(device)
        features = _apart(method, "forward", device.type, {}, views).features if scope == "head" else None
    return Task(method, views, aux, noise, features)


def adapted_weights(method: Method, scope: Literal["all", "head"]) -> Weights:
    """The parameters that the inner steps move: all trainable ones, or those outside `method.backbone`."""
    trainable: Weights = {name: p for name, p in method.named_parameters() if p.requires_grad}
    if scope == "all":
        return trainable
    backbone = {id(p) for p in method.backbone.parameters()}
    return {name: p for name, p in trainable.items() if id(p) not in backbone}


def gradient_of(
    loss: Tensor, weights: Weights, *, create_graph: bool = False, retain_graph: bool = False
) -> Weights:
    """∇ of `loss` (): a dictionary like `weights`; zeros where the loss does not depend on a weight."""
    kind = loss.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    scale = HALF_PRECISION_SCALE if half else 1.0
    retain_graph = retain_graph or create_graph
    # Autocast would also cast the matrix products of a backward that runs inside it, those of the float32
    # loss included.
    with full_precision(kind):
        gradients = torch.autograd.grad(
            loss * scale,
            list(weights.values()),
            create_graph=create_graph,
            retain_graph=retain_graph,
            materialize_grads=True,
        )
        return {name: g / scale if scale != 1 else g for name, g in zip(weights, gradients, strict=True)}


def full_precision(device_type: str) -> torch.autocast:
    """Losses, π and σ are computed without autocast: a KL under 1e-3 is noise in bfloat16."""
    return torch.autocast(device_type, enabled=False)


class _Part(nn.Module):
    """A function of the method as a module's forward: `functional_call` lends weights and buffers only to
    forwards.
    """

    def __init__(self, method: Method, part: Literal["forward", "targets"]):
        super().__init__()
        self.method, self.part = method, part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.method if self.part == "forward" else self.method.targets)(*args, **kwargs)


def _apart(
    method: Method,
    part: Literal["forward", "targets"],
    device_type: str,
    weights: Weights,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the method at `weights` with copies of its buffers, alone on this rank."""
    tensors = {f"method.{name}": buffer.detach().clone() for name, buffer in method.named_buffers()}
    tensors |= {f"method.{name}": weight for name, weight in weights.items()}
    # Autocast's cache would keep a cast copy of every θ_k until the outer autocast ends, and serve it again
    # should a weight be changed in place (the outputs were then identical, and σ was 0).
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    uncached = torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
    with rank_local(), uncached:
        return functional_call(_Part(method, part), tensors, args, kwargs)
