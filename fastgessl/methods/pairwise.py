"""A small network on the difference of every pair of rows, at O(N·H) memory beside the (N, M) result.

The first layer is linear, so W(x_i - y_j) = u_i - v_j: what remains is element-wise work on N·M·H numbers,
done a block of rows at a time and done again in the backward. Twice differentiable.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Numbers held at once: 8 MiB of float32, which a CPU's cache still helps with.
BLOCK_NUMBERS = 2**21


def pairwise_scores(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Σ_h weight_h · max(0, first_ih - second_jh): (N, H), (M, H), (H,) -> (N, M). Third derivatives raise
    RuntimeError.

    >>> second = torch.tensor([[1.0, 1.0], [4.0, -1.0]])
    >>> pairwise_scores(torch.tensor([[3.0, 0.0]]), second, torch.tensor([1.0, 10.0]))
    tensor([[ 2., 10.]])
    """
    return _Scores.apply(first, second, weight)


def mean_absolute_difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean over all pairs of |first_id - second_jd|: (N, D), (M, D) -> (D,), by sorting instead of N·M
    differences.

    >>> mean_absolute_difference(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]]))
    tensor([3.5000])
    """
    across = _sum_over_pairs(torch.cat([first, second])) - _sum_over_pairs(first) - _sum_over_pairs(second)
    return across / (len(first) * len(second))


def _sum_over_pairs(rows: Tensor) -> Tensor:
    """Σ_{i<j} |x_i - x_j| of each column: the k-th smallest is added k times and taken away once for each
    larger one.
    """
    places = torch.arange(len(rows), device=rows.device, dtype=rows.dtype)
    return (2 * places - len(rows) + 1) @ rows.sort(dim=0).values


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([difference.relu() @ weight for _, difference in _blocks(first, second)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        return _Gradients.apply(cotangent, *ctx.saved_tensors)


class _Gradients(torch.autograd.Function):
    """The first derivative as a function of its own. Where a difference is positive, the score is bilinear in
    it and the weight.
    """

    @staticmethod
    def forward(
        cotangent: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_first, to_second, to_weight = (
            torch.empty_like(first),
            torch.zeros_like(second),
            torch.zeros_like(weight),
        )
        for rows, difference in _blocks(first, second):
            on, slope = (difference > 0).to(first.dtype), cotangent[rows]
            to_first[rows] = torch.einsum("nm,nmh->nh", slope, on) * weight
            to_second -= torch.einsum("nm,nmh->mh", slope, on) * weight
            to_weight += torch.einsum("nm,nmh->h", slope, difference.relu())
        return to_first, to_second, to_weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor, ...]:
        return _Curvature.apply(*along, *ctx.saved_tensors)


class _Curvature(torch.autograd.Function):
    """The second derivative along given directions. It is an end: a third would be silently wrong if autograd
    could pass it by.
    """

    @staticmethod
    def forward(*operands: Tensor) -> tuple[Tensor, ...]:
        along_first, along_second, along_weight, cotangent, first, second, weight = operands
        to_cotangent, to_first, to_second = (
            torch.empty_like(cotangent),
            torch.empty_like(first),
            torch.zeros_like(second),
        )
        to_weight = torch.zeros_like(weight)
        for rows, difference in _blocks(first, second):
            on, slope = (difference > 0).to(first.dtype), cotangent[rows]
            moved = on * (along_first[rows, None] - along_second)
            to_cotangent[rows] = moved @ weight + difference.relu() @ along_weight
            to_first[rows] = torch.einsum("nm,nmh->nh", slope, on) * along_weight
            to_second -= torch.einsum("nm,nmh->mh", slope, on) * along_weight
            to_weight += torch.einsum("nm,nmh->h", slope, moved)
        return to_cotangent, to_first, to_second, to_weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "pairwise_scores has derivatives of first and second order; a third was asked for."
        )


def _blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of `first` at a time, and their differences from every row of `second`: (n, M, H)."""
    step = max(1, BLOCK_NUMBERS // max(second.numel(), 1))
    for start in range(0, len(first), step):
        rows = slice(start, start + step)
        yield rows, first[rows, None] - second
