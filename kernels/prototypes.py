"""The losses of prototype methods, DINO, SwAV and DISSL, and what they are made of besides a cross-entropy:
SwAV's balanced assignment, and the mean assignment that DISSL keeps spread out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastgessl.kernels import reference
from fastgessl.kernels.backend import dense, implementation_for
from fastgessl.kernels.checks import bias_of, operands_of, scale_of
from fastgessl.kernels.collectives import all_gather_rows, all_reduce_mean, check_equal_rows
from fastgessl.kernels.losses import How, Temperature, logsumexp_rows, soft_cross_entropy
from fastgessl.kernels.similarity.autograd import (
    Gradients,
    Statistics,
    compiled,
    gradients,
    gradients_body,
    nested,
    statistics,
    statistics_body,
    statistics_context,
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


def _fake_marginal(query, key, scale, bias, implementation):
    return torch.empty_like(bias), bias.new_empty(2, query.shape[0])


def nan_for_infinity(bias: Tensor) -> Tensor:
    """For a column bias that no user passed: what overflowed gives NaN, instead of an error about an argument
    that nobody wrote.
    """
    return torch.where(bias.isinf(), torch.nan, bias)


def _marginal_backward(
    ctx: Any,
    cotangents: Sequence[Tensor | None],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
) -> tuple[Any, ...]:
    teacher = ctx.saved_tensors[:4]
    query, key, scale, bias = teacher
    cotangent = torch.zeros_like(bias) if cotangents[0] is None else cotangents[0]
    # Σ_j u_j p_j = mean_i E_P[u] as a loss: the cross-entropy statistic of a student whose logits are the column bias -u,
    # in every row.
    student = (
        query.new_zeros(len(query), 1),
        key.new_zeros(len(key), 1),
        torch.ones_like(scale),
        nan_for_infinity(-cotangent),
    )
    operands = (*student, *teacher)
    saved = forward(*operands, None, None, False, *ctx.settings)[3].detach()
    weight = torch.full_like(saved[0], 1 / len(query))
    weights = (torch.zeros_like(weight), None, weight)
    needs = (*NOTHING, *ctx.needs_input_grad[:4])
    found = backward(*weights, *operands, None, None, saved, False, *ctx.settings, needs)
    return (*(grad if need else None for grad, need in zip(found[4:], needs[4:], strict=True)), None)


marginal, Marginal = nested(
    "softmax_marginal",
    marginal_body,
    _fake_marginal,
    statistics_context,
    _marginal_backward,
    [(statistics, Statistics), (gradients, Gradients)],
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


def other_views(rows: Tensor, targets: int) -> list[tuple[int, Tensor]]:
    """Each of the first `targets` views by number, with the rows of every other view: rows (V, N, D) ->
    (view, (V-1, N, D)).

    The last comes first, so that of two views the first is compared with the second before the second with
    the first.

    >>> import torch
    >>> rows = torch.arange(3.0).view(3, 1, 1)
    >>> [(view, others.flatten().tolist()) for view, others in other_views(rows, 2)]
    [(1, [0.0, 2.0]), (0, [1.0, 2.0])]
    """
    return [(view, torch.cat([rows[:view], rows[view + 1 :]])) for view in reversed(range(targets))]


def swapped_cross_entropy(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    *,
    temperature: Temperature,
    teacher_temperature: Temperature,
    teacher_biases: Tensor,
) -> Tensor:
    """DINO's and SwAV's loss: cross-entropy from the teacher's softmax on a view to the student's on another,
    averaged over all pairs of different views. student (V, N, D), teacher (T, N, E), whose views are the
    student's first; prototypes (K, D), (K, E); teacher_biases (T, K) -> ().

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, eq. (3), with
    biases -centre / temperature; Caron et al., "Unsupervised Learning of Visual Features by Contrasting
    Cluster Assignments", NeurIPS 2020, eq. (2), with those of `sinkhorn_potentials`.

    >>> import torch
    >>> rows, how = torch.eye(4).expand(2, 4, 4), {"temperature": 0.1, "teacher_temperature": 0.1}
    >>> swapped_cross_entropy(rows, rows[0], rows, rows[0], teacher_biases=torch.zeros(2, 4), **how) < 0.01
    tensor(True)
    """
    terms = [
        soft_cross_entropy(
            others.flatten(0, 1),
            prototypes,
            teacher[taught].repeat(len(others), 1),
            teacher_prototypes,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            teacher_bias=teacher_biases[taught],
        )
        for taught, others in other_views(student, len(teacher))
    ]
    return torch.stack(terms).mean()


def entropy_of_mean(
    rows: Tensor, key: Tensor, temperature: Temperature, group: ProcessGroup | None = None
) -> Tensor:
    """H[mean_i softmax(row_i·keyᵀ / temperature)] (), nats, over the rows (M, D) of all ranks of `group`; key
    (K, D). At most log K.

    >>> import torch
    >>> round(entropy_of_mean(torch.eye(4), torch.eye(4), 0.01).exp().item(), 4)
    4.0
    """
    mean = softmax_marginal(rows, key, temperature=temperature, group=group)
    # A prototype that no row takes is 0 in float32, where the logarithm has no derivative.
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return -(mean * mean.log()).sum()


def dissl_loss(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    *,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature = 0.5,
    entropy_weight: float = 2.3,
    invariance_weight: float = 0.8,
    group: ProcessGroup | None = None,
) -> Tensor:
    """CE(p(x), q(x')) - λ H[mean p] + β CE(p(x), p(x')), averaged over pairs of different views, in nats; p
    is the teacher's softmax over the prototypes, q the student's, λ the entropy's weight, β the invariance's.

    student (V, N, D), teacher (T, N, E), whose views are the student's first; prototypes (K, D), (K, E) ->
    (): the cross-entropies of this rank's rows, the entropy of the rows of all ranks of `group`. Gradients go
    to both sides. Dubois et al., "Improving Self-Supervised Learning by Characterizing Idealized
    Representations", NeurIPS 2022, eq. (10).

    >>> import torch
    >>> student, teacher = torch.randn(2, 8, 16), torch.randn(2, 8, 24)
    >>> dissl_loss(student, torch.randn(32, 16), teacher, torch.randn(32, 24)).shape
    torch.Size([])
    """
    assigned, predicted = _pairs(len(teacher), len(student))
    target = (teacher[assigned].flatten(0, 1), teacher_prototypes)
    distilled = soft_cross_entropy(
        student[predicted].flatten(0, 1),
        prototypes,
        *target,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
    )
    rows, others = (teacher[views].flatten(0, 1) for views in _pairs(len(teacher), len(teacher)))
    table = (others, teacher_prototypes, rows, teacher_prototypes)
    invariant = soft_cross_entropy(*table, temperature=teacher_temperature)
    entropies = [entropy_of_mean(view, teacher_prototypes, teacher_temperature, group) for view in teacher]
    return distilled - entropy_weight * torch.stack(entropies).mean() + invariance_weight * invariant


def _pairs(targets: int, views: int) -> tuple[list[int], list[int]]:
    """Every pair of a target view and a different view: the targets' indices and the others'."""
    pairs = [(target, view) for target in range(targets) for view in range(views) if view != target]
    return [target for target, _ in pairs], [view for _, view in pairs]
