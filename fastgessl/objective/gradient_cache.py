"""Exact large-batch steps in the memory of a small one: embeddings first, the loss over all of them, then
gradients chunk by chunk.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, section
3.2: since the loss sees the encoder's outputs only, ∇L = Σ_chunks ⟨∂L/∂outputs, ∂outputs/∂θ⟩, and a chunk's
graph can be made anew when its turn comes.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastgessl.config import GesslConfig, UsageError
from fastgessl.methods.base import Method, Outputs
from fastgessl.objective.gessl import Result
from fastgessl.objective.inner import attach_gradients
from fastgessl.objective.task import Noise, full_precision

_BY_ROW = ("features", "projections", "predictions")
"""The fields of `Outputs` that hold one row a sample, along dimension 1. The others are weights, the same in
every chunk."""


class CachedObjective(nn.Module):
    """A method's plain loss, called like `GeSSL` and with its gradient, of which only `chunk` samples are in
    autograd's graph at a time.

    Costs one further forward without a graph. Without batch norm the gradient is that of the whole batch at
    once, to rounding. With batch norm a chunk is normalised by its own statistics, as a rank's rows are under
    local batch norm, and both passes agree on them; running statistics move once a chunk, before the
    gradient. UsageError with `w_sigma` above 0: σ is measured on tasks, which are mini-batches.

    >>> from fastgessl.config import MethodConfig, ModelConfig
    >>> from fastgessl.methods import RunFacts, build_method
    >>> from fastgessl.models import build_backbone
    >>> backbone = build_backbone(ModelConfig(stem="small", width=0.125))
    >>> method = build_method(MethodConfig(projector_hidden=16), backbone, RunFacts())
    >>> objective = CachedObjective(method, GesslConfig(), chunk=8)
    >>> result = objective([torch.randn(32, 3, 8, 8), torch.randn(32, 3, 8, 8)])
    >>> result.loss.backward()
    >>> tuple(result.outputs.projections.shape)
    (2, 32, 128)
    """

    def __init__(self, method: Method, settings: GesslConfig, chunk: int):
        super().__init__()
        if settings.w_sigma > 0:
            raise UsageError(
                "gradient caching is for plain methods: under GeSSL a mini-batch is a task, and inner steps "
                "need its whole graph. "
                "Use --train.accumulate to average over more tasks, or set --gessl.w_sigma 0."
            )
        self.method, self.settings, self.chunk = method, settings, chunk

    def forward(
        self,
        views: Sequence[Tensor],
        step: int = 0,
        query_views: Sequence[Tensor] | None = None,
        inner_lr: float | None = None,
        labels: Tensor | None = None,
        *,
        measured: bool = True,
    ) -> Result:
        """V views of N samples -> Result, as `GeSSL.forward` gives it; `query_views` and `inner_lr` belong to
        GeSSL and are not used.
        """
        self.method.check_views(views, labels)
        # Chunks of nearly one size: a last chunk of one row would have no batch statistics.
        count = -(-len(views[0]) // self.chunk)
        parts = list(zip(*(view.tensor_split(count) for view in views), strict=True))
        part_labels = [None] * count if labels is None else list(labels.tensor_split(count))
        rows = [len(part[0]) for part in parts]
        aux = _joined(
            [self.method.targets(part, own) for part, own in zip(parts, part_labels, strict=True)], rows
        )
        noises, outputs = self._embed(parts)
        with torch.no_grad(), full_precision(views[0].device.type):
            aux = self.method.settle(outputs, aux)
        loss, slopes, metrics = self._loss(outputs, aux, measured)
        gradients = self._gradients(parts, noises, slopes)
        weights = [weight for weight in self.method.parameters() if weight.requires_grad]
        loss = self.settings.w_ssl * attach_gradients(loss, weights, gradients)
        return Result(loss, metrics, outputs, aux)

    @torch.no_grad()
    def _embed(self, parts: Sequence[Sequence[Tensor]]) -> tuple[list[Noise], Outputs]:
        """The first pass, which keeps no graph. It alone moves batch-norm statistics."""
        noises, found = [], []
        for part in parts:
            noises.append(Noise.now(part[0].device))
            found.append(self.method(part))
        # Should autocast have cached weights that were cast without a graph, it would serve them to the
        # second pass, which needs one.
        torch.clear_autocast_cache()
        rows = {
            name: torch.cat([getattr(out, name) for out in found], dim=1)
            for name in _BY_ROW
            if getattr(found[0], name) is not None
        }
        for name in _tensors(found[0]).keys() - rows.keys():
            if not _shared([getattr(out, name) for out in found]):
                raise UsageError(
                    f"gradient caching takes {type(found[0]).__name__}.{name} for a weight, the same for "
                    "every chunk, and it is not. Keep "
                    f"what belongs to a sample in {', '.join(_BY_ROW)}, or leave out --train.gradient_cache."
                )
        return noises, replace(found[0], **rows)

    def _loss(
        self, outputs: Outputs, aux: Any, measured: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """L over all rows, ∂L/∂outputs by field, and what to log."""
        with torch.enable_grad(), full_precision(outputs.features.device.type):
            leaves = {name: value.detach().requires_grad_() for name, value in _tensors(outputs).items()}
            loss = self.method.loss(replace(outputs, **leaves), aux)
            slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            with torch.no_grad():
                metrics = {"loss_ssl": loss.detach()} | (
                    self.method.measures(outputs, aux) if measured else {}
                )
        return (
            loss.detach(),
            {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None},
            metrics,
        )

    def _gradients(
        self, parts: Sequence[Sequence[Tensor]], noises: Sequence[Noise], slopes: dict[str, Tensor]
    ) -> list[Tensor]:
        """∇L, a tensor a trainable weight: each chunk's outputs once more, with a graph, and back along the
        slopes.
        """
        weights = [weight for weight in self.method.parameters() if weight.requires_grad]
        totals = [torch.zeros_like(weight) for weight in weights]
        rows = {
            name: slope.split([len(part[0]) for part in parts], dim=1)
            for name, slope in slopes.items()
            if name in _BY_ROW
        }
        for place, (part, noise) in enumerate(zip(parts, noises, strict=True)):
            buffers = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
            with torch.enable_grad(), noise.replayed():
                out = functional_call(self.method, buffers, (part,))
            # A weight among the outputs, such as prototypes, has one slope for the whole batch: it goes back
            # with the first chunk.
            own = {
                name: rows[name][place] if name in rows else slope
                for name, slope in slopes.items()
                if name in rows or place == 0
            }
            reached = {name: getattr(out, name) for name in own if getattr(out, name).requires_grad}
            with full_precision(part[0].device.type):
                found = torch.autograd.grad(
                    list(reached.values()), weights, [own[name] for name in reached], materialize_grads=True
                )
            torch._foreach_add_(totals, list(found))
        return totals


def _tensors(outputs: Outputs) -> dict[str, Tensor]:
    return {
        field.name: value for field in fields(outputs) if (value := getattr(outputs, field.name)) is not None
    }


def _joined(parts: Sequence[Any], rows: Sequence[int]) -> Any:
    """What `Method.targets` gave for chunks of so many rows, as it would be for all of them.

    Tensors (V, N, D) are joined along dimension 1 and (N,), (N, D) along 0; what every chunk shares, such as
    a queue, stays. UsageError for what is neither.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return first if len(parts) == 1 or _shared(parts) else _concatenated(parts, rows)
    if is_dataclass(first) and not isinstance(first, type):
        return replace(
            first,
            **{
                field.name: _joined([getattr(part, field.name) for part in parts], rows)
                for field in fields(first)
            },
        )
    if isinstance(first, tuple | list):
        joined = [_joined(column, rows) for column in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], rows) for name in first}
    return first


def _shared(parts: Sequence[Tensor]) -> bool:
    """The same memory, or the same numbers; labels may be the same by chance, and rows of embeddings cannot
    be.
    """
    first = parts[0]
    if all(part.shape == first.shape and part.data_ptr() == first.data_ptr() for part in parts):
        return True
    return first.is_floating_point() and all(torch.equal(part, first) for part in parts)


def _concatenated(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    dim = 1 if parts[0].dim() == 3 else 0
    if any(part.dim() == 0 or part.shape[dim] != count for part, count in zip(parts, rows, strict=True)):
        raise UsageError(
            f"the method's targets hold a tensor of shape {tuple(parts[0].shape)} that differs from chunk "
            f"to chunk of {rows[0]} rows and "
            "has no row for each, so gradient caching would change the loss. Train with "
            "--train.gradient_cache 0."
        )
    return torch.cat(list(parts), dim=dim)
