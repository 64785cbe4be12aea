"""Symmetric InfoNCE in blocks of rows: both directions' softmaxes from one table, so that a step costs 1 + 3
matmul units instead of 2 + 6.

With S = s·Q·Kᵀ square, P its row softmax and P' its column softmax, the losses are lse_i − S_ii and lse'_j −
S_jj, and the gradient to the logits is

    G_ij = w_i·P_ij + v_j·P'_ij + p_i·[i = j]

for weights w of the row statistics, v of the column statistics, p of the diagonal. `tied_gradients` is the
same for queries that are the keys (NT-Xent): there P' is Pᵀ, and the gradient (G + Gᵀ)·Q takes 1 + 1 units
instead of 1 + 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgessl.kernels.similarity.chunked import (
    LOG2_E,
    Parts,
    Rows,
    accumulation_dtype,
    fill_excluded,
    rounded_logsumexp,
)
from fastgessl.kernels.similarity.row_blocks import row_blocks


def statistics(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        total.mul_(_exp(top - highest)).add_(_exp(logits - highest).sum(0))
        top = highest
        row_top = logits.amax(1, keepdim=True)
        lse[rows], correction[rows] = rounded_logsumexp(row_top[:, 0], _exp(logits.sub_(row_top)).sum(1))
    column_lse, column_correction = rounded_logsumexp(top, total)
    return lse, column_lse, diagonal, correction, column_correction


def _exp(values: Tensor) -> Tensor:
    return values.mul_(LOG2_E).exp2_()


def gradients(
    weights: Rows,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    lse: Tensor,
    column_lse: Tensor,
    needs: tuple[bool, ...],
) -> Parts:
    """Gradients to image, text and scale. `weights` holds w, p and v, as lse, positive and divergence, w and
    v corrected.
    """
    wide = accumulation_dtype(image.dtype)
    query, key = image.to(wide), text.to(wide)
    out_image = torch.empty_like(query) if needs[0] else None
    out_text = torch.zeros_like(key) if needs[1] else None
    out_scale = torch.zeros_like(scale) if needs[2] else None
    for rows in row_blocks(query, key):
        scaled = query[rows] * scale
        logits = scaled @ key.T
        gradient = _exp(logits - column_lse).mul_(weights.divergence)
        gradient.addcmul_(_exp(logits.sub_(lse[rows, None])), weights.lse[rows, None])
        gradient.diagonal(rows.start).add_(weights.positive[rows])
        if out_image is not None or out_scale is not None:
            through_key = gradient @ key
            if out_scale is not None:
                out_scale.add_((through_key * query[rows]).sum())
            if out_image is not None:
                out_image[rows] = through_key * scale
        if out_text is not None:
            out_text.addmm_(gradient.T, scaled)
    to_image, to_text = (None if part is None else part.to(image.dtype) for part in (out_image, out_text))
    return Parts(to_image, to_text, out_scale)


def tied_gradients(
    weights: Rows,
    query: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    exclude: Tensor | None,
    lse: Tensor,
    needs: tuple[bool, ...],
) -> Parts:
    """Gradients to queries that are their own keys, and to the scale, of weighted lse and positives. Indices
    as in `similarity.chunked`.

    Weights are corrected.
    """
    rows_of = query.to(accumulation_dtype(query.dtype))
    finite = lse if exclude is None else lse.masked_fill(lse == -torch.inf, torch.inf)
    out, out_scale = torch.empty_like(rows_of), torch.zeros_like(scale)
    for rows in row_blocks(query, query):
        logits = (rows_of[rows] * scale) @ rows_of.T
        mirrored = _exp(logits - finite)
        gradient = _exp(logits.sub_(finite[rows, None])).mul_(weights.lse[rows, None])
        if exclude is not None:
            _fill_pairs(gradient, exclude, rows, mirrored)
        gradient.addcmul_(mirrored, weights.lse)
        if positives is not None:
            _add_pairs(gradient, positives, weights.positive, rows)
        through = gradient @ rows_of
        if needs[2]:
            out_scale.add_((through * rows_of[rows]).sum() / 2)  # Σ (G + Gᵀ)∘C counts each pair twice
        out[rows] = through * scale
    return Parts(out.to(query.dtype) if needs[0] else None, None, out_scale if needs[2] else None)


def _fill_pairs(gradient: Tensor, exclude: Tensor, rows: slice, mirrored: Tensor) -> None:
    """0 where a row of the block excludes a column, and, in `mirrored`, where a column excludes a row of the
    block.
    """
    fill_excluded(gradient, exclude[rows], 0.0)
    for excluded in exclude.unbind(1):
        index, inside = _in_block(excluded, rows)
        mirrored.scatter_(0, index, torch.where(inside, 0.0, mirrored.gather(0, index)))


def _add_pairs(gradient: Tensor, positives: Tensor, weight: Tensor, rows: slice) -> None:
    """Add the weight of each row's positive at (row, positive), and of each column's at (positive, column),
    where they lie in the block.
    """
    inside = positives[rows]
    gradient.scatter_add_(1, inside.clamp(min=0)[:, None], weight[rows].masked_fill(inside < 0, 0.0)[:, None])
    index, present = _in_block(positives, rows)
    gradient.scatter_add_(0, index, torch.where(present, weight, 0.0))


def _in_block(numbers: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Row numbers (N,) as those of a block, and which of them lie in it, (1, N) each. Their places would have
    to be waited for on a GPU.
    """
    return (numbers - rows.start).clamp(0, rows.stop - rows.start - 1)[None], (
        (numbers >= rows.start) & (numbers < rows.stop)
    )[None]
