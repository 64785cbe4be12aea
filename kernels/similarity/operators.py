"""The operators of the softmax over similarities, as torch.compile sees them: opaque, with fakes and a
registered autograd.

`statistics` (forward), `gradients` (backward) and `curvature` (double backward) take the eight operands in
this order: the student's query, key, scale, bias, then the teacher's. A bias, or the whole teacher, may be
None; a key that is None means the queries themselves. An output that is absent or not needed is an empty
tensor.

Registered autograd serves torch.compile only: under func.grad it fails, and under func.jvp it returns 0
without an error (torch 2.15). Eager code goes through the nested functions of `similarity`, which share the
rules written here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgessl.kernels.checks import check_values
from fastgessl.kernels.similarity import chunked, symmetric_chunked
from fastgessl.kernels.similarity.chunked import Parts, Rows, Side, Statistics

OPERANDS = 8
WEIGHTS = 3


def sides_of(operands: Sequence[Any]) -> tuple[Side, Side | None]:
    query, key = operands[:2]
    return Side(query, query if key is None else key, *operands[2:4]), None if operands[4] is None else Side(
        *operands[4:]
    )


def packed(found: Statistics) -> Tensor:
    """What the later passes read of the forward's results, (2, M), or (5, M) with a teacher."""
    return torch.stack([found.lse, *(part for part in found[3:] if len(part))])


def unpacked(saved: Tensor) -> Statistics:
    """The inverse of `packed`."""
    lse, correction, *teacher = saved.unbind()
    none = lse.new_empty(0)
    return Statistics(lse, none, none, correction, *(teacher or (none, none, none)))


def implementation_module(name: str) -> Any:
    """The module that holds statistics, gradients and curvature under this name. Triton is imported on its
    first use only.
    """
    return chunked if name == "chunked" else importlib.import_module("fastgessl.kernels.similarity.launch")


def present(parts: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator cannot return None: an empty tensor stands for what is absent."""
    return tuple(like.new_empty(0) if part is None else part for part in parts)


def contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Cotangents have any strides (cat gives narrow views, sum stride 0); neither gradcheck nor opcheck
    notices a kernel that minds.

    In forward mode they may also be zeros without memory, which nothing can be added to in place.
    """
    return [
        None if tensor is None else tensor.clone() if tensor._is_zerotensor() else tensor.contiguous()
        for tensor in tensors
    ]


def _row_dtype(query: Tensor) -> torch.dtype:
    return chunked.accumulation_dtype(query.dtype)


def statistics_body(
    query: Tensor, key: Tensor | None, scale: Tensor, bias: Tensor | None,
    teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_scale: Tensor | None, teacher_bias: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, entropy: bool, implementation: str, given: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """lse, positive and divergence, (M,) each, empty where there are no positives or no teacher; and what the
    later passes read.

    `given` is an `arguments.Given`: whose values are checked.
    """
    check_values(
        scale,
        teacher_scale,
        bias,
        teacher_bias,
        positives,
        exclude,
        len(query if key is None else key),
        given,
    )
    operands = contiguous((query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias))
    with torch.autocast(query.device.type, enabled=False):
        found = implementation_module(implementation).statistics(
            *sides_of(operands), positives, exclude, entropy
        )
    return *found[:3], packed(found)


statistics = custom_op("fastgessl::similarity_statistics", statistics_body, mutates_args=())


@statistics.register_fake
def _(
    query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias, positives, exclude, *_
):
    M, none, dtype = query.shape[0], 0, _row_dtype(query)
    shapes = (
        (M,),
        (none if positives is None else M,),
        (none if teacher_query is None else M,),
        (2 if teacher_query is None else 5, M),
    )
    return tuple(query.new_empty(shape, dtype=dtype) for shape in shapes)


def gradients_body(
    weight_lse: Tensor, weight_positive: Tensor | None, weight_divergence: Tensor | None,
    query: Tensor, key: Tensor | None, scale: Tensor, bias: Tensor | None,
    teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_scale: Tensor | None, teacher_bias: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, saved: Tensor,
    entropy: bool, implementation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Σ weights·statistics to the eight operands; empty where `needs` says no."""
    weights = Rows(*present(contiguous((weight_lse, weight_positive, weight_divergence)), saved))
    operands = contiguous((query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias))
    statistics = unpacked(saved)
    with torch.autocast(query.device.type, enabled=False):
        if implementation == "chunked" and key is None and bias is None and teacher_query is None:
            weights = statistics.correct(weights)
            tied = symmetric_chunked.tied_gradients(
                weights, operands[0], scale, positives, exclude, statistics.lse, tuple(needs[:4])
            )
            return present((*tied, *(None,) * 4), query)  # type: ignore[return-value]
        student, teacher = implementation_module(implementation).gradients(
            weights,
            *sides_of(operands),
            positives,
            exclude,
            statistics,
            entropy,
            tuple(needs[:4]),
            tuple(needs[4:]),
            tied=key is None,
        )
    return present((*student, *teacher), query)  # type: ignore[return-value]


def _fake_gradients(operands, needs):
    like = operands[0]
    return tuple(
        torch.empty_like(part) if need else like.new_empty(0)
        for part, need in zip(operands, needs, strict=True)
    )


gradients = custom_op("fastgessl::similarity_gradients", gradients_body, mutates_args=())


@gradients.register_fake
def _(*args):
    return _fake_gradients(args[WEIGHTS : WEIGHTS + OPERANDS], args[-1])


def curvature_body(
    tangent_query: Tensor | None, tangent_key: Tensor | None, tangent_scale: Tensor | None, tangent_bias: Tensor | None,
    tangent_teacher_query: Tensor | None, tangent_teacher_key: Tensor | None,
    tangent_teacher_scale: Tensor | None, tangent_teacher_bias: Tensor | None,
    weight_lse: Tensor, weight_positive: Tensor | None, weight_divergence: Tensor | None,
    query: Tensor, key: Tensor | None, scale: Tensor, bias: Tensor | None,
    teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_scale: Tensor | None, teacher_bias: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, saved: Tensor,
    entropy: bool, implementation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ⟨tangents, gradients(...)⟩ to the three weights and the eight operands; empty where absent
    or where `needs` says no."""
    tangents = contiguous((tangent_query, tangent_key, tangent_scale, tangent_bias))
    teacher_tangents = contiguous(
        (tangent_teacher_query, tangent_teacher_key, tangent_teacher_scale, tangent_teacher_bias)
    )
    weights = Rows(*present(contiguous((weight_lse, weight_positive, weight_divergence)), saved))
    operands = contiguous((query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias))
    statistics = unpacked(saved)
    with torch.autocast(query.device.type, enabled=False):
        if implementation == "triton" and any(part is not None for part in teacher_tangents):
            # Chunked takes over, with statistics of its own: on those of the kernels, whose logits are
            # rounded otherwise, σ's second derivatives at τ = 0.01 were wrong by 2.5e-4 (float32), 2.5e-6
            # with its own.
            implementation, statistics = (
                "chunked",
                chunked.statistics(*sides_of(operands), positives, exclude, entropy),
            )
        moments, student, teacher = implementation_module(implementation).curvature(
            Parts(*tangents), Parts(*teacher_tangents), weights, *sides_of(operands),
            positives, exclude, statistics, entropy, tuple(needs[:4]), tuple(needs[4:]), tied=key is None,
        )  # fmt: skip
    rows = chunked.row_derivatives(moments)
    return (*rows, *present((*student, *teacher), query))  # type: ignore[return-value]


curvature = custom_op("fastgessl::similarity_curvature", curvature_body, mutates_args=())


@curvature.register_fake
def _(*args):
    weights, operands = args[OPERANDS : OPERANDS + WEIGHTS], args[OPERANDS + WEIGHTS : 2 * OPERANDS + WEIGHTS]
    saved = args[2 * OPERANDS + WEIGHTS + 2]
    rows = tuple(saved.new_empty(saved.shape[1] if weight is not None else 0) for weight in weights)
    return (*rows, *_fake_gradients(operands, args[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], *outputs: Tensor) -> None:
    """Keep tensors as saved tensors, for both modes, and the rest as it is."""
    tensors = [part for part in inputs if part is None or isinstance(part, Tensor)]
    ctx.settings = tuple(part for part in inputs if part is not None and not isinstance(part, Tensor))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *outputs)


def _some(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    """None for what an operator returned as absent."""
    return None if operand is None or gradient is None else gradient


def statistics_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs[:-1], output[3])  # values are checked once


def gradients_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs)


def statistics_backward(
    ctx: Any, cotangents: Sequence[Tensor | None], apply: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    *operands, positives, exclude, saved = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:OPERANDS])
    weights = [
        cotangents[0],
        None if positives is None else cotangents[1],
        None if operands[4] is None else cotangents[2],
    ]
    present = (True, positives is not None, operands[4] is not None)
    weights = [
        torch.zeros_like(saved[0]) if here and weight is None else weight
        for here, weight in zip(present, weights, strict=True)
    ]
    # lse enters as a constant: what the gradients owe to its dependence on the operands is already in the
    # curvature.
    found = apply(*weights, *operands, positives, exclude, saved.detach(), *ctx.settings, needs)
    grads = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - OPERANDS))


def gradients_backward(
    ctx: Any, tangents: Sequence[Tensor | None], apply: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    weights, operands = inputs[:WEIGHTS], inputs[WEIGHTS : WEIGHTS + OPERANDS]
    *settings, wanted = ctx.settings
    needs = tuple(ctx.needs_input_grad[WEIGHTS : WEIGHTS + OPERANDS])
    tangents = [tangent if asked else None for tangent, asked in zip(tangents, wanted, strict=True)]
    found = apply(*tangents, *inputs, *settings, needs)
    rows = (None if weight is None else row for weight, row in zip(weights, found[:WEIGHTS], strict=True))
    grads = (grad if need else None for grad, need in zip(found[WEIGHTS:], needs, strict=True))
    return (*rows, *grads, *(None,) * (len(ctx.needs_input_grad) - WEIGHTS - len(operands)))


THIRD_ORDER = (
    "fastgessl.kernels: third derivatives of the similarity losses are not implemented. "
    'Pass implementation="reference" for derivatives of any order on a dense table.'
)


def _third_order(ctx: Any, *cotangents: Tensor) -> None:
    raise RuntimeError(THIRD_ORDER)


statistics.register_autograd(
    lambda ctx, *cotangents: statistics_backward(ctx, cotangents, gradients), setup_context=statistics_context
)
gradients.register_autograd(
    lambda ctx, *tangents: gradients_backward(ctx, tangents, curvature), setup_context=gradients_context
)
curvature.register_autograd(_third_order)
