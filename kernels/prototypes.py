"""What prototype methods need besides a cross-entropy: SwAV's balanced assignment, and the mean assignment
that DISSL keeps spread out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from fastgessl.kernels import reference
from fastgessl.kernels.backend import dense, implementation_for
from fastgessl.kernels.checks import bias_of, operands_of, scale_of
from fastgessl.kernels.collectives import all_gather_rows, all_reduce_mean, check_equal_rows
from fastgessl.kernels.losses import How, Temperature, logsumexp_rows
from fastgessl.kernels.similarity.autograd import (
    Gradients,
    ReverseFunction,
    Statistics,
    body_or_operator,
    compiled,
    gradients,
    gradients_body,
    statistics,
    statistics_body,
)
from fastgessl.kernels.similarity.chunked import NOTHING
from fastgessl.kernels.similarity.problem import Side

NO_SIDE = (None,) * 4
BIAS_ONLY = (False, False, False, True, *(False,) * 4)


def marginal_body(
    query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    """p_j = mean_i P_ij (N,), which is the gradient of mean_i lse_i to the column bias; and what is saved of
    lse (2, M).
    """
    saved = statistics_body(query, key, scale, bias, *NO_SIDE, None, None, False, implementation)[3]
    weight = torch.full_like(saved[0], 1 / len(query))
    operands = (query, key, scale, bias, *NO_SIDE)
    found = gradients_body(weight, None, None, *operands, None, None, saved, False, implementation, BIAS_ONLY)
    return found[3], saved


marginal = custom_op("fastgessl::softmax_marginal", marginal_body, mutates_args=())


@marginal.register_fake
def _(query, key, scale, bias, implementation):
    return torch.empty_like(bias), bias.new_empty(2, query.shape[0])


def nan_for_infinity(bias: Tensor) -> Tensor:
    """For a column bias that no user passed: what overflowed gives NaN, instead of an error about an argument
    that nobody wrote.
    """
    return torch.where(bias.isinf(), torch.nan, bias)


def _marginal_backward(
    ctx: Any,
    cotangent: Tensor,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
) -> tuple[Any, ...]:
    teacher, implementation = ctx.saved_tensors[:4], ctx.implementation
    query, key, scale, _ = teacher
    # Σ_j u_j p_j = mean_i E_P[u] as a loss: the cross-entropy statistic of a student whose logits are the column bias -u,
    # in every row.
    student = (
        query.new_zeros(len(query), 1),
        key.new_zeros(len(key), 1),
        torch.ones_like(scale),
        nan_for_infinity(-cotangent),
    )
    operands = (*student, *teacher)
    saved = forward(*operands, None, None, False, implementation)[3].detach()
    weight = torch.full_like(saved[0], 1 / len(query))
    weights = (torch.zeros_like(weight), None, weight)
    needs = (*NOTHING, *ctx.needs_input_grad[:4])
    found = backward(*weights, *operands, None, None, saved, False, implementation, needs)
    return (*(grad if need else None for grad, need in zip(found[4:], needs[4:], strict=True)), None)


class Marginal(ReverseFunction):
    """The mean softmax, twice differentiable; the second output is for the later passes only."""

    @staticmethod
    def forward(*inputs):
        return body_or_operator(marginal_body, marginal, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _marginal_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, cotangent, _):
        return _marginal_backward(ctx, cotangent, Statistics.apply, Gradients.apply)


def _marginal_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.implementation = inputs[4]
    ctx.save_for_backward(*inputs[:4], output[1])


marginal.register_autograd(
    lambda ctx, cotangent, _: _marginal_backward(ctx, cotangent, statistics, gradients),
    setup_context=_marginal_context,
)


def softmax_marginal(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """p_j = mean over rows of softmax_j(q_i·k_j/τ + bias_j), e.g. for DISSL's entropy of the mean assignment.
    (M, D), (N, D) -> (N,).

    Twice differentiable. Keys are prototypes, the same on every rank; with `group` the mean runs over the
    rows of all ranks. Raises ValueError for shapes, dtypes, devices or temperatures that do not fit, and for
    ranks with unequal numbers of rows.

    >>> import torch
    >>> softmax_marginal(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor([0.5000, 0.5000])
    """
    query, key = operands_of(query, key)
    if group is not None:
        check_equal_rows(query, group, "query")
    scale = scale_of(temperature, query)
    wide_bias = scale.new_zeros(len(key)) if bias is None else bias_of(bias, key)
    name, _ = implementation_for(query, implementation)
    if name == "reference":
        mean = dense(reference.softmax_marginal, query, key, scale.reciprocal(), wide_bias)
    else:
        call = marginal if compiled(query, key, scale, wide_bias) else Marginal.apply
        mean = call(query, key, scale, wide_bias, name)[0]
    return all_reduce_mean(mean, group)


def sinkhorn_potentials(
    query: Tensor,
    prototypes: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """SwAV's assignment as a column bias: softmax_j(q_i·c_j/ε + b_j) after `iterations` Sinkhorn steps.

    (M, D), (N, D) -> (N,), mean 0, no gradient.

    Caron et al. 2020, §3.1. Each step is one streaming log-sum-exp over the rows and one over the prototypes;
    no table is stored. Pass the result as `teacher_bias` of `soft_cross_entropy` with
    `teacher_temperature=epsilon`. With `group`, prototypes are the same on every rank and the balance is over
    the rows of all ranks. Raises ValueError for operands that do not fit, epsilon ≤ 0 or iterations < 1.

    >>> import torch
    >>> sinkhorn_potentials(torch.eye(2), torch.eye(2))
    tensor([0., 0.])
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, found {iterations}.")
    query, prototypes = operands_of(query.detach(), prototypes.detach(), ("query", "prototypes"))
    scale = scale_of(epsilon, query, "epsilon")
    name, _ = implementation_for(query, implementation)
    if name == "reference" and group is None:
        return dense(reference.sinkhorn_potentials, query, prototypes, epsilon, iterations)
    how = How(None, "gather", name)
    with torch.no_grad():
        row_potential = scale.new_zeros(len(query))
        for step in range(iterations):
            columns = -logsumexp_rows(Side(prototypes, query, scale, row_potential), None, how)
            if group is not None:
                shards = all_gather_rows(-columns[None], group)
                columns = -shards.logsumexp(0)
            columns = nan_for_infinity(columns)
            if step < iterations - 1:
                rows = logsumexp_rows(Side(query, prototypes, scale, columns), None, how)
                row_potential = nan_for_infinity(-rows)
        return columns - columns.mean()
