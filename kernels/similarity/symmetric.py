"""Operators and autograd of symmetric InfoNCE (CLIP): both directions from one table, twice differentiable.

The backward is fused; the double backward is that of its two terms, rows and columns, through
`similarity.Curvature`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgessl.kernels.checks import Given, check_values, signed_once
from fastgessl.kernels.similarity import symmetric_chunked
from fastgessl.kernels.similarity.autograd import (
    Curvature,
    RowDerivatives,
    Statistics,
    compiled,
    one_call_each,
    plain,
)
from fastgessl.kernels.similarity.chunked import Rows, accumulation_dtype
from fastgessl.kernels.similarity.operators import (
    OPERANDS,
    WEIGHTS,
    contiguous,
    curvature,
    implementation_module,
    present,
)

NONE = (None,) * 5
"""No bias and no teacher."""
DIFFERENTIABLE = 3
"""Image, text, scale."""


def statistics_body(
    image: Tensor, text: Tensor, scale: Tensor, implementation: str, given: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse of the rows, lse of the columns and the diagonal, (N,) each; and what the later passes read, (2, 2,
    N): both lse, corrected.

    `given` is an `arguments.Given`: whether the scale is checked.
    """
    check_values(scale, None, None, None, None, None, len(text), given)
    image, text = contiguous((image, text))
    with torch.autocast(image.device.type, enabled=False):
        if implementation == "chunked":
            found = symmetric_chunked.statistics(image, text, scale)
        else:
            found = implementation_module(implementation).symmetric_statistics(image, text, scale)
    lse, column_lse, diagonal, correction, column_correction = found
    saved = torch.stack([lse, correction, column_lse, column_correction]).view(2, 2, -1)
    return lse, column_lse, diagonal, saved


def gradients_body(
    weight_lse: Tensor, weight_column: Tensor, weight_positive: Tensor, image: Tensor, text: Tensor, scale: Tensor,
    saved: Tensor, implementation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Σ weights·statistics to image, text and scale; empty where `needs` says no."""
    rows, columns, positive, image, text = contiguous(
        (weight_lse, weight_column, weight_positive, image, text)
    )
    call = (
        symmetric_chunked.gradients
        if implementation == "chunked"
        else implementation_module(implementation).symmetric_gradients
    )
    with torch.autocast(image.device.type, enabled=False):
        (lse, correction), (column_lse, column_correction) = saved
        weights = Rows(rows * correction, positive, columns * column_correction)
        found = call(weights, image, text, scale, lse, column_lse, tuple(needs))
    return present(found[:DIFFERENTIABLE], image)  # type: ignore[return-value]


statistics = custom_op("fastgessl::symmetric_statistics", statistics_body, mutates_args=())
gradients = custom_op("fastgessl::symmetric_gradients", gradients_body, mutates_args=())


@statistics.register_fake
def _(image, text, scale, implementation, given):
    N = len(image)
    return tuple(
        image.new_empty(shape, dtype=accumulation_dtype(image.dtype))
        for shape in ((N,), (N,), (N,), (2, 2, N))
    )


@gradients.register_fake
def _(weight_lse, weight_column, weight_positive, image, text, scale, saved, implementation, needs):
    return tuple(
        torch.empty_like(part) if need else image.new_empty(0)
        for part, need in zip((image, text, scale), needs, strict=True)
    )


def _both_directions(
    function: Callable[..., tuple[Tensor, ...]],
    tangents: Sequence[Any],
    weights: Sequence[Any],
    at: Sequence[Tensor],
    tail: Sequence[Any],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`function` (curvature or row derivatives) of the rows' term and of the columns' term."""
    image, text, scale, (saved, _) = at
    pairs = torch.arange(len(image), device=image.device)
    # The columns' lse anew, from the product as this pass takes it, keys by queries: the other way round it
    # is rounded otherwise, which made second derivatives at τ = 0.01 wrong by 5.4e-5 instead of 2.2e-6
    # (float32).
    column_saved = Statistics.apply(text, image, scale, *NONE, None, None, False, tail[0], Given())[
        3
    ].detach()
    to_image, to_text, to_scale = tangents
    # Half of the diagonal goes to each term: with all of it in one, terms that cancel where P is nearly 1
    # would meet only after rounding.
    row_weights = (weights[0], weights[2] / 2, None) if weights else ()
    column_weights = (weights[1], weights[2] / 2, None) if weights else ()
    rows = function(
        to_image,
        to_text,
        to_scale,
        *NONE,
        *row_weights,
        image,
        text,
        scale,
        *NONE,
        pairs,
        None,
        saved,
        False,
        *tail,
    )
    columns = function(
        to_text,
        to_image,
        to_scale,
        *NONE,
        *column_weights,
        text,
        image,
        scale,
        *NONE,
        pairs,
        None,
        column_saved,
        False,
        *tail,
    )
    return rows, columns


def _bent(
    function: Callable[..., tuple[Tensor, ...]],
    tangents: Sequence[Any],
    weights: Sequence[Any],
    at: Sequence[Tensor],
    implementation: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives of ⟨tangents, gradients⟩ to the three weights, and to image, text and scale."""
    needs = (True, True, True, *(False,) * (OPERANDS - DIFFERENTIABLE))
    rows, columns = _both_directions(function, tangents, weights, at, (implementation, needs))
    image, text, scale = rows[WEIGHTS : WEIGHTS + DIFFERENTIABLE]
    text_again, image_again, scale_again = columns[WEIGHTS : WEIGHTS + DIFFERENTIABLE]
    return [rows[0], columns[0], rows[1]], [image + image_again, text + text_again, scale + scale_again]


def _statistics_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.implementation = inputs[3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[3])


def _gradients_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.implementation, ctx.needs = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])


def _statistics_backward(
    ctx: Any, weights: Sequence[Tensor | None], apply: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    image, text, scale, saved = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:DIFFERENTIABLE])
    weights = [torch.zeros_like(saved[0, 0]) if weight is None else weight for weight in weights[:WEIGHTS]]
    # Both lse enter as constants, as in `similarity.operators.statistics_backward`.
    found = apply(*weights, image, text, scale, saved.detach(), ctx.implementation, needs)
    return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None)


def _gradients_backward(
    ctx: Any, tangents: Sequence[Any], function: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    weights, at = ctx.saved_tensors[:WEIGHTS], ctx.saved_tensors[WEIGHTS:]
    asked = [tangent if need else None for tangent, need in zip(tangents, ctx.needs, strict=True)]
    rows, operands = _bent(function, asked, weights, at, ctx.implementation)
    return (*rows, *operands, *(None,) * 3)


@signed_once
class SymmetricGradients(torch.autograd.Function):
    """Backward, itself differentiable once."""

    @staticmethod
    def forward(*inputs):
        return (gradients_body if plain(inputs) else gradients)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _gradients_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx, *tangents):
        return _gradients_backward(ctx, tangents, Curvature.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        weights, at = ctx.saved_tensors[:WEIGHTS], ctx.saved_tensors[WEIGHTS:]
        bent = _bent(
            Curvature.apply, tangents[WEIGHTS : WEIGHTS + DIFFERENTIABLE], weights, at, ctx.implementation
        )[1]
        moved = [
            torch.zeros_like(weight) if tangent is None else tangent
            for tangent, weight in zip(tangents, weights, strict=False)
        ]
        straight = SymmetricGradients.apply(*moved, *at, ctx.implementation, ctx.needs)
        return tuple(a + b if need else b for a, b, need in zip(bent, straight, ctx.needs, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_call_each(SymmetricGradients, info.batch_size, in_dims, args)


@signed_once
class SymmetricStatistics(torch.autograd.Function):
    """Forward, twice differentiable."""

    @staticmethod
    def forward(*inputs):
        return (statistics_body if plain(inputs) else statistics)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _statistics_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_forward(*inputs[:3], output[3])

    @staticmethod
    def backward(ctx, *weights):
        return _statistics_backward(ctx, weights, SymmetricGradients.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        rows, columns = _both_directions(
            RowDerivatives.apply, tangents[:DIFFERENTIABLE], (), ctx.saved_tensors, (ctx.implementation,)
        )
        return rows[0], columns[0], rows[1], None

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_call_each(SymmetricStatistics, info.batch_size, in_dims, args)


statistics.register_autograd(
    lambda ctx, *weights: _statistics_backward(ctx, weights, gradients), setup_context=_statistics_context
)
gradients.register_autograd(
    lambda ctx, *tangents: _gradients_backward(ctx, tangents, curvature), setup_context=_gradients_context
)


def symmetric_info_nce(
    image: Tensor, text: Tensor, scale: Tensor, implementation: str, given: Given
) -> Tensor:
    """Mean of both directions' InfoNCE, pair by pair.  (N, D) twice, 0-d 1/τ -> (N,). `given`: whether the
    scale is checked.
    """
    call = statistics if compiled(image, text, scale) else SymmetricStatistics.apply
    lse, column_lse, diagonal, _ = call(image, text, scale, implementation, given)
    return (lse + column_lse) / 2 - diagonal
