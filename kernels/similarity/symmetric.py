"""Symmetric InfoNCE (CLIP): both directions' softmaxes from one table, twice differentiable, so that a step costs 1 + 3
matmul units instead of 2 + 6.

With S = s·Q·Kᵀ square, P its row softmax and P' its column softmax, the losses are lse_i − S_ii and lse'_j − S_jj, and the
gradient to the logits is

    G_ij = w_i·P_ij + v_j·P'_ij + p_i·[i = j]

for weights w of the row statistics, v of the column statistics, p of the diagonal. The double backward is that of the two
terms, rows and columns, through `similarity.autograd.Curvature`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgessl.kernels.similarity.autograd import (
    OPERANDS,
    WEIGHTS,
    Curvature,
    Statistics,
    compiled,
    contiguous,
    curvature,
    empty_where_needed,
    gradients_context,
    implementation_module,
    nested,
    present,
    statistics_context,
)
from fastgessl.kernels.similarity.chunked import accumulation_dtype, exp_, rounded_logsumexp, row_blocks
from fastgessl.kernels.similarity.problem import PairWeights, SideValues

NONE = (None,) * 5
"""No bias and no teacher."""
DIFFERENTIABLE = 3
"""Image, text, scale."""


def chunked_statistics(
    image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse of the rows, lse of the columns, the diagonal, and the corrections of both lse, (N,) each.

    The columns' maximum and sum run along with the blocks.
    """
    wide = accumulation_dtype(image.dtype)
    query, key = image.to(wide) * scale, text.to(wide)
    lse, correction, diagonal = (query.new_empty(len(query)) for _ in range(3))
    top, total = query.new_full((len(key),), -torch.inf), query.new_zeros(len(key))
    for rows in row_blocks(query, key):
        logits = query[rows] @ key.T
        diagonal[rows] = logits.diagonal(rows.start)
        highest = torch.maximum(top, logits.amax(0))
        total.mul_(exp_(top - highest)).add_(exp_(logits - highest).sum(0))
        top = highest
        row_top = logits.amax(1, keepdim=True)
        lse[rows], correction[rows] = rounded_logsumexp(row_top[:, 0], exp_(logits.sub_(row_top)).sum(1))
    column_lse, column_correction = rounded_logsumexp(top, total)
    return lse, column_lse, diagonal, correction, column_correction


def chunked_gradients(
    weights: PairWeights,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    lse: Tensor,
    column_lse: Tensor,
    needs: tuple[bool, ...],
) -> SideValues:
    """Gradients to image, text and scale; w and v come corrected for the rounding of both lse."""
    wide = accumulation_dtype(image.dtype)
    query, key = image.to(wide), text.to(wide)
    out_image = torch.empty_like(query) if needs[0] else None
    out_text = torch.zeros_like(key) if needs[1] else None
    out_scale = torch.zeros_like(scale) if needs[2] else None
    for rows in row_blocks(query, key):
        scaled = query[rows] * scale
        logits = scaled @ key.T
        gradient = exp_(logits - column_lse).mul_(weights.column)
        gradient.addcmul_(exp_(logits.sub_(lse[rows, None])), weights.row[rows, None])
        gradient.diagonal(rows.start).add_(weights.diagonal[rows])
        if out_image is not None or out_scale is not None:
            through_key = gradient @ key
            if out_scale is not None:
                out_scale.add_((through_key * query[rows]).sum())
            if out_image is not None:
                out_image[rows] = through_key * scale
        if out_text is not None:
            out_text.addmm_(gradient.T, scaled)
    to_image, to_text = (None if part is None else part.to(image.dtype) for part in (out_image, out_text))
    return SideValues(to_image, to_text, out_scale)


def statistics_body(
    image: Tensor, text: Tensor, scale: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse of the rows, lse of the columns and the diagonal, (N,) each; and what the later passes read, (2, 2, N): both
    lse with their corrections.
    """
    image, text = contiguous((image, text))
    with torch.autocast(image.device.type, enabled=False):
        if implementation == "chunked":
            found = chunked_statistics(image, text, scale)
        else:
            found = implementation_module(implementation).symmetric_statistics(image, text, scale)
    lse, column_lse, diagonal, correction, column_correction = found
    saved = torch.stack([lse, correction, column_lse, column_correction]).view(2, 2, -1)
    return lse, column_lse, diagonal, saved


def gradients_body(
    weight_row: Tensor, weight_column: Tensor, weight_diagonal: Tensor, image: Tensor, text: Tensor, scale: Tensor,
    saved: Tensor, implementation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Σ weights·statistics to image, text and scale; empty where `needs` says no."""
    rows, columns, diagonal, image, text = contiguous(
        (weight_row, weight_column, weight_diagonal, image, text)
    )
    call = (
        chunked_gradients
        if implementation == "chunked"
        else implementation_module(implementation).symmetric_gradients
    )
    with torch.autocast(image.device.type, enabled=False):
        (lse, correction), (column_lse, column_correction) = saved
        weights = PairWeights(rows * correction, columns * column_correction, diagonal)
        found = call(weights, image, text, scale, lse, column_lse, tuple(needs))
    return present(found[:DIFFERENTIABLE], image)  # type: ignore[return-value]


def _fake_statistics(image, text, scale, implementation):
    N = len(image)
    return tuple(
        image.new_empty(shape, dtype=accumulation_dtype(image.dtype))
        for shape in ((N,), (N,), (N,), (2, 2, N))
    )


def _fake_gradients(
    weight_row, weight_column, weight_diagonal, image, text, scale, saved, implementation, needs
):
    return empty_where_needed((image, text, scale), needs)


def _statistics_backward(
    ctx: Any, weights: Sequence[Tensor | None], apply: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    image, text, scale, saved = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:DIFFERENTIABLE])
    weights = [torch.zeros_like(saved[0, 0]) if weight is None else weight for weight in weights[:WEIGHTS]]
    # Both lse enter as constants, as in `similarity.autograd.statistics_backward`.
    found = apply(*weights, image, text, scale, saved.detach(), *ctx.settings, needs)
    return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), None)


def _gradients_backward(
    ctx: Any, tangents: Sequence[Tensor | None], function: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    """Derivatives of ⟨tangents, gradients⟩ to the three weights, and to image, text and scale: those of the rows' term and
    of the columns' term, by `function` (curvature).
    """
    weight_row, weight_column, weight_diagonal, image, text, scale, (saved, _) = ctx.saved_tensors
    implementation, asked = ctx.settings
    to_image, to_text, to_scale = (
        tangent if need else None for tangent, need in zip(tangents, asked, strict=True)
    )
    # The columns' lse again, from the product as this pass takes it, keys by queries: the other way round it is rounded
    # otherwise, which made second derivatives at τ = 0.01 wrong by 5.4e-5 instead of 2.2e-6 (float32).
    column_saved = Statistics.apply(text, image, scale, *NONE, None, None, False, implementation)[3].detach()
    # Half of the diagonal goes to each term: with all of it in one, terms that cancel where P is nearly 1 would meet only
    # after rounding.
    half = weight_diagonal / 2
    pairs = torch.arange(len(image), device=image.device)
    rest = (False, implementation, (*(True,) * DIFFERENTIABLE, *(False,) * (OPERANDS - DIFFERENTIABLE)))
    row_term = (weight_row, half, None, image, text, scale, *NONE, pairs, None, saved)
    column_term = (weight_column, half, None, text, image, scale, *NONE, pairs, None, column_saved)
    rows = function(to_image, to_text, to_scale, *NONE, *row_term, *rest)
    columns = function(to_text, to_image, to_scale, *NONE, *column_term, *rest)
    of_image, of_text, of_scale = rows[WEIGHTS : WEIGHTS + DIFFERENTIABLE]
    text_again, image_again, scale_again = columns[WEIGHTS : WEIGHTS + DIFFERENTIABLE]
    operands = (of_image + image_again, of_text + text_again, of_scale + scale_again)
    return (rows[0], columns[0], rows[1], *operands, *(None,) * 3)


gradients, SymmetricGradients = nested(
    "symmetric_gradients",
    gradients_body,
    _fake_gradients,
    gradients_context,
    _gradients_backward,
    [(curvature, Curvature)],
)
statistics, SymmetricStatistics = nested(
    "symmetric_statistics",
    statistics_body,
    _fake_statistics,
    statistics_context,
    _statistics_backward,
    [(gradients, SymmetricGradients)],
)


def symmetric_info_nce(image: Tensor, text: Tensor, scale: Tensor, implementation: str) -> Tensor:
    """Mean of both directions' InfoNCE, pair by pair.  (N, D) twice, 0-d 1/τ -> (N,)."""
    call = statistics if compiled(image, text, scale) else SymmetricStatistics.apply
    lse, column_lse, diagonal, _ = call(image, text, scale, implementation)
    return (lse + column_lse) / 2 - diagonal
