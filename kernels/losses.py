"""The losses: streaming, twice differentiable in everything, in any floating dtype, over one device or a
group of ranks.

Contrastive losses (`similarity_logsumexp`, `info_nce`, `nt_xent`, `clip_loss`) come first, then divergences between two
softmaxes over similarities, a teacher's and a student's (`sigma_kl`, `soft_cross_entropy`, `gessl_loss`).

Common to all. Operands are matrices (rows, features) of float64, float32, bfloat16 or float16; statistics and
results are float32 (float64 for float64). Nothing is normalised unless the docstring says so. `temperature`
is a number or a 0-d tensor that may need a gradient. `positives` (M,) and `exclude` (M,) or (M, 2) are int64
column numbers, -1 = none; a row without a positive, or with every column excluded, has zero loss and zero
gradient and is still counted by reduction "mean" (the others: "sum", "none"). NaN in an operand gives NaN.
Under torch.autocast operands are cast as those of a matmul, and may come in different dtypes.

With `group`, a process group, keys are those of all ranks and column numbers are global (rank r's own keys
start at r·N); each rank gets the loss of its own rows, and DDP's averaging gives the gradient of the global
mean. mode "gather" gives each rank a copy of all keys; "ring" passes them around. `implementation` forces
"reference", "chunked" or "triton".

The two sides of a divergence may differ in features, temperatures and column biases, not in rows and keys. Gradients of
both orders go to both sides; detach the teacher where none should. Without `teacher_temperature` the teacher has the
student's, as a constant: a temperature that is learnt has its gradient from the student alone. Pass it as
`teacher_temperature` too if it shall move the teacher.

Shapes, dtypes, devices, indices and temperatures that do not fit raise
ValueError; third derivatives and forward mode raise
RuntimeError.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import normalize

from fastgessl.kernels import reference
from fastgessl.kernels.backend import dense, implementation_for
from fastgessl.kernels.checks import (
    bias_of,
    check_choices,
    check_pair,
    exclude_of,
    matmul_dtype,
    operands_of,
    positives_of,
    scale_of,
)
from fastgessl.kernels.collectives import all_gather_rows, rank_and_size
from fastgessl.kernels.similarity import similarity_statistics
from fastgessl.kernels.similarity.problem import Side
from fastgessl.kernels.similarity.symmetric import symmetric_info_nce

Temperature = float | Tensor

LARGEST_STORED_CLIP = 1 << 18
"""Chunked, both directions share a table: at 512 x 512 it takes 1.2, 1.1 and 1.6 times as long as the stored
one (forward, with backward, with double backward), at 1,024 x 1,024 0.6, 0.9 and 1.1."""
LARGEST_STORED_GESSL = 1 << 16
"""Chunked, both losses share a table: at 256 x 256 it takes 0.95, 1.2 and 1.0 times as long as the stored one
(forward, with backward, with double backward), at 512 x 512 0.5, 1.0 and 0.8."""


class How(NamedTuple):
    """Over which ranks a loss is computed, how their keys are met, and by which implementation."""

    group: ProcessGroup | None
    mode: str
    implementation: str | None


class Columns(NamedTuple):
    """Which columns a row looks at."""

    positives: Tensor
    exclude: Tensor | None
    ignores: bool
    """Whether a row may have no positive, or no columns left: only a user's indices have such rows."""


def _columns(
    query: Tensor, key: Tensor, positives: Tensor | None, exclude: Tensor | None, how: How
) -> Columns:
    rank, size = rank_and_size(how.group)
    return Columns(
        positives_of(positives, query, len(key), rank, size),
        exclude_of(exclude, query, size * len(key)),
        positives is not None or exclude is not None,
    )


def _chosen(side: Side, exclude: Tensor | None, how: How, largest: float = math.inf) -> str:
    """The implementation's name. The dense table is only for one process, without `exclude`, and for at most `largest`
    entries.
    """
    entries = len(side.query) * len(side.key)
    storable = how.group is None and exclude is None and entries <= largest
    return implementation_for(side.query, how.implementation, entries if storable else math.inf)[0]


def _with_all_keys(side: Side, how: How, implementation: str, owner: str) -> tuple[Side, ProcessGroup | None]:
    """The side with the keys and column biases of all ranks; or as it is, and the group in which its keys are to travel.
    The dense reference gathers always.
    """
    if how.group is None:
        return side, None
    if how.mode == "ring" and implementation != "reference":
        return side, how.group
    bias = None if side.bias is None else all_gather_rows(side.bias, how.group, "bias")
    return side._replace(key=all_gather_rows(side.key, how.group, owner), bias=bias), None


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    """(M,) -> () or (M,). The mean counts ignored rows."""
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def _where_columns_are_left(values: Tensor, lse: Tensor, exclude: Tensor | None) -> Tensor:
    """0 in rows whose columns are all excluded."""
    return values if exclude is None else values.masked_fill(lse == -torch.inf, 0.0)


def _contrastive(lse: Tensor, positive: Tensor, columns: Columns) -> Tensor:
    """InfoNCE of each row."""
    if not columns.ignores:
        return lse - positive
    rows = _where_columns_are_left(lse - positive, lse, columns.exclude)
    return rows.masked_fill(columns.positives < 0, 0.0)


def similarity_logsumexp(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """lse_i = log Σ_j exp(q_i·k_j/τ + bias_j), the primitive that other losses are composed from.  (M, D),
    (N, D), bias (N,) -> (M,).

    A row with every column excluded gives -inf, the logarithm of an empty sum, with zero gradient.

    >>> import torch
    >>> similarity_logsumexp(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor([1.3133, 1.3133])
    """
    check_choices("none", mode)
    query, key = operands_of(query, key)
    side = Side(query, key, scale_of(temperature, query), bias_of(bias, key))
    columns = len(key) * rank_and_size(group)[1]
    return logsumexp_rows(side, exclude_of(exclude, query, columns), How(group, mode, implementation))


def logsumexp_rows(side: Side, exclude: Tensor | None, how: How) -> Tensor:
    """`similarity_logsumexp` of operands that are checked."""
    name = _chosen(side, exclude, how)
    side, ring = _with_all_keys(side, how, name, "key")
    if name == "reference":
        return dense(
            reference.similarity_logsumexp, side.query, side.key, side.scale.reciprocal(), side.bias, exclude
        )
    return similarity_statistics(side, None, None, exclude, False, name, ring)[0]


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """-log( exp(q_i·k_pos/τ) / Σ_j exp(q_i·k_j/τ) ), van den Oord et al. 2018, eq. (4).  (M, D), (N, D) -> ()
    or (M,).

    Without `positives` row i's positive is key i. The sum runs over the columns that are not excluded; an
    excluded positive leaves the sum but stays the positive (decoupled contrastive loss).

    >>> import torch
    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    check_choices(reduction, mode)
    query, key = operands_of(query, key)
    how = How(group, mode, implementation)
    columns = _columns(query, key, positives, exclude, how)
    side = Side(query, key, scale_of(temperature, query), None)
    return _reduced(_info_nce_rows(side, columns, how), reduction)


def _info_nce_rows(side: Side, columns: Columns, how: How, owner: str = "key") -> Tensor:
    name = _chosen(side, columns.exclude, how)
    tied = side.key is side.query
    side, ring = _with_all_keys(side, how, name, owner)
    if name == "reference":
        return dense(
            reference.info_nce, *side[:2], side.scale.reciprocal(), columns.positives, columns.exclude
        )
    lse, positive, _ = similarity_statistics(
        side, None, columns.positives, columns.exclude, False, name, ring, tied=tied and how.group is None
    )
    return _contrastive(lse, positive, columns)


def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Temperature = 0.5,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """SimCLR's loss, Chen et al. 2020, eq. (1), over the 2N rows of both views; normalises them.  (N, D)
    twice -> () or (2N,).

    A row's positive is its image's other view; the row itself is excluded, the other 2N - 1 stay.

    >>> import torch
    >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.5514)
    """
    check_pair(view1, view2, ("view1", "view2"))
    if view1.shape != view2.shape:
        raise ValueError(
            f"view1 and view2 must hold the same images; found shapes {tuple(view1.shape)} and "
            f"{tuple(view2.shape)}."
        )
    check_choices(reduction, mode)
    scale = scale_of(temperature, view1)
    rows = normalize(torch.cat([view1, view2]).to(scale.dtype), dim=1).to(view1.dtype).to(matmul_dtype(view1))
    first = 0 if group is None else rank_and_size(group)[0] * len(rows)
    own = torch.arange(first, first + len(rows), device=rows.device)
    columns = Columns(own.roll(len(view1)), own[:, None], ignores=False)
    how = How(group, mode, implementation)
    return _reduced(_info_nce_rows(Side(rows, rows, scale, None), columns, how, "view1"), reduction)


def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: Temperature,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """Mean of InfoNCE from image to text and from text to image, Radford et al. 2021, fig. 3.  (N, D) twice
    -> () or (N,).

    >>> import torch
    >>> clip_loss(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    image, text = operands_of(image, text, ("image", "text"))
    if image.shape != text.shape:
        raise ValueError(
            f"image and text must be paired row by row; found shapes {tuple(image.shape)} and "
            f"{tuple(text.shape)}."
        )
    check_choices(reduction, mode)
    side = Side(image, text, scale_of(temperature, image), None)
    how = How(group, mode, implementation)
    if group is not None:
        columns = _columns(image, text, None, None, how)
        to_text = _info_nce_rows(side, columns, how, "text")
        to_image = _info_nce_rows(side._replace(query=text, key=image), columns, how, "image")
        return _reduced((to_text + to_image) / 2, reduction)
    name = _chosen(side, None, how, LARGEST_STORED_CLIP)
    if name == "reference":
        return _reduced(dense(reference.clip_loss, image, text, side.scale.reciprocal()), reduction)
    return _reduced(symmetric_info_nce(image, text, side.scale, name), reduction)


def _student_and_teacher(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    temperatures: tuple[Temperature, Temperature | None],
    biases: tuple[Tensor | None, Tensor | None],
) -> tuple[Side, Side]:
    """Both softmaxes' operands, checked."""
    query, key = operands_of(operands[0], operands[1], ("student_query", "student_key"))
    student = Side(query, key, scale_of(temperatures[0], query), bias_of(biases[0], key, "student_bias"))
    query, key = operands_of(operands[2], operands[3], ("teacher_query", "teacher_key"))
    tables = [(len(student.query), len(student.key)), (len(query), len(key))]
    if tables[0] != tables[1]:
        raise ValueError(
            f"student and teacher must have as many rows and as many keys; found (rows, keys) {tables[0]} "
            f"and {tables[1]}."
        )
    kinds = [f"{side.dtype} on {side.device}" for side in (student.query, query)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"student and teacher must share dtype and device; found {kinds[0]} and {kinds[1]}.")
    if temperatures[1] is None:
        # A target does not move: through both softmaxes σ's derivative to a shared temperature was 1.3 times the
        # student's own.
        scale = student.scale.detach()
    else:
        scale = scale_of(temperatures[1], query, "teacher_temperature")
    return student, Side(query, key, scale, bias_of(biases[1], key, "teacher_bias"))


def _divergence_rows(
    definition: Callable[..., Tensor], student: Side, teacher: Side, exclude: Tensor | None, how: How
) -> Tensor:
    """`sigma_kl` or `soft_cross_entropy` of each row; `definition` is the dense one, which says which of them."""
    exclude = exclude_of(exclude, student.query, len(student.key) * rank_and_size(how.group)[1])
    name = _chosen(student, exclude, how)
    student, ring = _with_all_keys(student, how, name, "student_key")
    teacher, _ = _with_all_keys(teacher, how, name, "teacher_key")
    if name == "reference":
        return _dense_divergence(definition, student, teacher, exclude)
    entropy = definition is reference.sigma_kl
    lse, _, cross_term = similarity_statistics(student, teacher, None, exclude, entropy, name, ring)
    return _where_columns_are_left(cross_term + lse, lse, exclude)


def _dense_divergence(
    definition: Callable[..., Tensor], student: Side, teacher: Side, exclude: Tensor | None
) -> Tensor:
    operands = (*student[:2], *teacher[:2], student.scale.reciprocal(), teacher.scale.reciprocal())
    return dense(definition, *operands, student.bias, teacher.bias, exclude)


def sigma_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    temperature: Temperature = 0.1,
    teacher_temperature: Temperature | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    exclude: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """KL(P_teacher ‖ P_student) of the row softmaxes: GeSSL's σ-measurement (arXiv 2405.01053).

    (M, D), (N, D), (M, E), (N, E) -> () or (M,).

    >>> import torch
    >>> student, teacher = torch.eye(2), torch.eye(2).flip(0)
    >>> sigma_kl(student, student, teacher, student, temperature=1.0)
    tensor(0.4621)
    """
    check_choices(reduction, mode)
    sides = _student_and_teacher(
        (student_query, student_key, teacher_query, teacher_key),
        (temperature, teacher_temperature),
        (student_bias, teacher_bias),
    )
    how = How(group, mode, implementation)
    return _reduced(_divergence_rows(reference.sigma_kl, *sides, exclude, how), reduction)


def soft_cross_entropy(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    temperature: Temperature = 0.1,
    teacher_temperature: Temperature | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    exclude: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """-Σ_j P_teacher,ij log P_student,ij: `sigma_kl` plus the teacher's entropy.  (M, D), (N, D), (M, E), (N,
    E) -> () or (M,).

    The student's gradient equals that of `sigma_kl`; the teacher's does not. With prototypes as keys, a
    column bias and detached teacher this is the loss of DINO (bias = -centre/τ_t) and SwAV (bias =
    `sinkhorn_potentials`), and without detaching DISSL's.

    >>> import torch
    >>> prototypes = torch.eye(3)
    >>> soft_cross_entropy(prototypes, prototypes, prototypes, prototypes, temperature=1.0, teacher_temperature=0.1)
    tensor(0.5515)
    """
    check_choices(reduction, mode)
    sides = _student_and_teacher(
        (student_query, student_key, teacher_query, teacher_key),
        (temperature, teacher_temperature),
        (student_bias, teacher_bias),
    )
    how = How(group, mode, implementation)
    return _reduced(_divergence_rows(reference.soft_cross_entropy, *sides, exclude, how), reduction)


def gessl_loss(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    temperature: Temperature = 0.1,
    teacher_temperature: Temperature | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's InfoNCE and its KL from a teacher, (M,) each, in one pass over the student's table.

    For a teacher that is at hand before the step, as in distillation; GeSSL's own self-motivated target is
    not, so its trainer calls `info_nce` and `sigma_kl` one after the other.

    >>> import torch
    >>> contrastive, sigma = gessl_loss(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2), temperature=1.0)
    >>> contrastive, sigma
    (tensor([0.3133, 0.3133]), tensor([0., 0.]))
    """
    check_choices("none", mode)
    student, teacher = _student_and_teacher(
        (student_query, student_key, teacher_query, teacher_key),
        (temperature, teacher_temperature),
        (student_bias, teacher_bias),
    )
    how = How(group, mode, implementation)
    columns = _columns(student.query, student.key, positives, exclude, how)
    name = _chosen(student, columns.exclude, how, LARGEST_STORED_GESSL)
    student, ring = _with_all_keys(student, how, name, "student_key")
    teacher, _ = _with_all_keys(teacher, how, name, "teacher_key")
    if name == "reference":
        contrastive = dense(
            reference.info_nce,
            *student[:2],
            student.scale.reciprocal(),
            columns.positives,
            columns.exclude,
            student.bias,
        )
        return contrastive, _dense_divergence(reference.sigma_kl, student, teacher, columns.exclude)
    lse, positive, cross_term = similarity_statistics(
        student, teacher, columns.positives, columns.exclude, True, name, ring
    )
    sigma = _where_columns_are_left(cross_term + lse, lse, columns.exclude)
    return _contrastive(lse, positive, columns), sigma
