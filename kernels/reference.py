"""What every kernel must equal: the dense definition of each public function, as readable as the paper.

Plain differentiable PyTorch that stores the (M, N) table; autograd gives its derivatives of any order.
Arguments are those of the public functions, already checked, with `temperature` a number or a 0-d tensor,
`positives` (M,) and `exclude` (M, 1 or 2) int64 or None, -1 = none.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

Temperature = float | Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(query: Tensor, key: Tensor, temperature: Temperature, bias: Tensor | None = None) -> Tensor:
    """(M, D), (N, D) -> (M, N), in float32 or float64."""
    wide = accumulation_dtype(query.dtype)
    table = (query.to(wide) / temperature) @ key.to(wide).T
    return table if bias is None else table + bias.to(wide)


def excluded_columns(table: Tensor, exclude: Tensor | None) -> Tensor:
    """(M, N), (M, 1 or 2) -> (M, N) of bool: True where the column takes no part in the row's softmax."""
    if exclude is None:
        return torch.zeros_like(table, dtype=torch.bool)
    columns = torch.arange(table.shape[1], device=table.device)
    return (columns == exclude.unsqueeze(-1)).any(1)


def log_softmax(table: Tensor, exclude: Tensor | None) -> Tensor:
    """log P, with 0 (not -inf) at excluded columns so that a sum over the row may run over all of them."""
    if exclude is None:
        return table.log_softmax(1)
    excluded = excluded_columns(table, exclude)
    # A row without columns would be -inf - (-inf): give it one made-up column and let the callers drop the
    # row.
    open_rows = excluded & ~excluded.all(1, keepdim=True)
    return table.masked_fill(open_rows, -torch.inf).log_softmax(1).masked_fill(excluded, 0.0)


def empty_rows(table: Tensor, exclude: Tensor | None) -> Tensor:
    """(M,) of bool: True where every column is excluded."""
    return excluded_columns(table, exclude).all(1)


def similarity_logsumexp(
    query: Tensor,
    key: Tensor,
    temperature: Temperature,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """lse_i = log Σ_j exp(q_i·k_j/τ + bias_j) over the columns that are not excluded; -inf where none is
    left.  (M, D), (N, D) -> (M,).
    """
    return _logsumexp(logits(query, key, temperature, bias), exclude)


def _logsumexp(table: Tensor, exclude: Tensor | None) -> Tensor:
    if exclude is None:
        return table.logsumexp(1)
    excluded, empty = excluded_columns(table, exclude), empty_rows(table, exclude)
    lse = table.masked_fill(excluded & ~empty[:, None], -torch.inf).logsumexp(1)
    return lse.masked_fill(empty, -torch.inf)


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: Temperature,
    positives: Tensor,
    exclude: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """lse_i - (q_i·k_pos/τ + bias_pos); 0 for rows without a positive or without columns.  -> (M,)."""
    table = logits(query, key, temperature, bias)
    if exclude is None:
        return cross_entropy(table, positives, ignore_index=-1, reduction="none")
    positive = table.gather(1, positives.clamp(min=0)[:, None])[:, 0]
    ignored = (positives < 0) | empty_rows(table, exclude)
    lse = _logsumexp(table, exclude)
    return torch.where(ignored, 0.0, lse.masked_fill(ignored, 0.0) - positive)


def nt_xent(view1: Tensor, view2: Tensor, temperature: Temperature) -> Tensor:
    """InfoNCE of the 2N normalised rows against one another: a row's positive is its image's other view, the
    row itself is excluded.

    -> (2N,).
    """
    rows = normalize(torch.cat([view1, view2]), dim=1)
    index = torch.arange(len(rows), device=rows.device)
    return info_nce(rows, rows, temperature, index.roll(len(view1)), index[:, None])


def clip_loss(image: Tensor, text: Tensor, temperature: Temperature) -> Tensor:
    """Mean of InfoNCE from image to text and from text to image, pair by pair.  (N, D), (N, D) -> (N,)."""
    table, index = logits(image, text, temperature), torch.arange(len(image), device=image.device)
    return (
        cross_entropy(table, index, reduction="none") + cross_entropy(table.T, index, reduction="none")
    ) / 2


def sigma_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    temperature: Temperature,
    teacher_temperature: Temperature,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """KL(P_teacher ‖ P_student) of each row; 0 where every column is excluded.  -> (M,)."""
    student = logits(student_query, student_key, temperature, student_bias)
    teacher = logits(teacher_query, teacher_key, teacher_temperature, teacher_bias)
    log_teacher = log_softmax(teacher, exclude)
    terms = log_teacher.exp() * (log_teacher - log_softmax(student, exclude))
    return terms.sum(1)


def soft_cross_entropy(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    temperature: Temperature,
    teacher_temperature: Temperature,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """-Σ_j P_teacher,ij log P_student,ij of each row; 0 where every column is excluded.  -> (M,)."""
    student = logits(student_query, student_key, temperature, student_bias)
    teacher = logits(teacher_query, teacher_key, teacher_temperature, teacher_bias)
    terms = log_softmax(teacher, exclude).exp() * -log_softmax(student, exclude)
    return terms.sum(1)


def softmax_marginal(
    query: Tensor, key: Tensor, temperature: Temperature, bias: Tensor | None = None
) -> Tensor:
    """p_j = mean_i P_ij.  (M, D), (N, D) -> (N,)."""
    return logits(query, key, temperature, bias).softmax(1).mean(0)


def sinkhorn_potentials(query: Tensor, prototypes: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Column bias b (N,) such that softmax_j(q_i·c_j/ε + b_j) is SwAV's assignment of row i after so many
    iterations.

    Caron et al. 2020, §3.1: divide by the sums over samples (prototypes become equally likely), then by the
    sums over prototypes.
    """
    assignment = logits(query, prototypes, epsilon).detach()
    scores = assignment.clone()
    for _ in range(iterations):
        assignment = assignment - assignment.logsumexp(0, keepdim=True)
        assignment = assignment - assignment.logsumexp(1, keepdim=True)
    # assignment = scores + row potential + column potential; the row potential cancels in the softmax.
    bias = (assignment - scores)[0]
    return bias - bias.mean()
