"""Divergences between two softmaxes over similarities, a teacher's and a student's:

σ-measurement, and the student losses of DINO, SwAV, DISSL.

What `losses` says of operands, indices, reductions and groups holds here. The two sides may differ in
features, temperatures and column biases, not in rows and keys. Gradients of both orders go to both sides;
detach the teacher where none should.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from fastgessl.kernels import reference
from fastgessl.kernels.backend import as_matmul, dense
from fastgessl.kernels.checks import (
    Given,
    check_bias,
    check_choices,
    check_pair,
    check_teacher,
    checked,
    exclude_of,
    positives_of,
    scale_of,
)
from fastgessl.kernels.collectives import rank_and_size
from fastgessl.kernels.losses import (
    How,
    Temperature,
    chosen_for,
    contrastive_rows,
    gathered,
    reduced,
    where_columns_are_left,
)
from fastgessl.kernels.similarity.autograd import similarity_statistics
from fastgessl.kernels.similarity.chunked import Side

LARGEST_STORED_GESSL = 1 << 16
"""Chunked, both losses share a table: at 256 x 256 it takes 0.95, 1.2 and 1.0 times as long as the stored one
(forward, with backward, with double backward), at 512 x 512 0.5, 1.0 and 0.8."""


class _Sides(NamedTuple):
    """Both softmaxes' operands, checked, and how to compute on them."""

    student: Side
    teacher: Side
    implementation: str
    ring: ProcessGroup | None
    given: Given


def _sides(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    temperatures: tuple[Temperature, Temperature | None],
    biases: tuple[Tensor | None, Tensor | None],
    exclude: Tensor | None,
    how: How,
    largest: float = math.inf,
    chosen: Tensor | None = None,
) -> _Sides:
    """`chosen`: positives that a user passed."""
    group, mode, _ = how
    sides, ring = [], None
    for owner, query, key, given, bias in zip(
        ("student", "teacher"), operands[::2], operands[1::2], temperatures, biases, strict=True
    ):
        check_pair(query, key, (f"{owner}_query", f"{owner}_key"))
        check_bias(bias, key, f"{owner}_bias")
        name, temperature = (
            ("temperature", temperatures[0])
            if given is None
            else (f"{owner}_temperature".removeprefix("student_"), given)
        )
        if given is None and owner == "teacher" and isinstance(temperature, Tensor):
            # A target does not move: through both softmaxes σ's derivative to a shared temperature was 1.3
            # times the student's own.
            temperature = temperature.detach()
        query, key = as_matmul(query, key)
        scale = scale_of(temperature, query, name)
        implementation = chosen_for(query, key, exclude, how, largest)
        key, wide_bias, ring = gathered(key, bias, scale, group, mode, implementation, f"{owner}_key")
        sides.append(Side(query, key, scale, wide_bias))
    check_teacher(*sides)
    users = Given(*(isinstance(value, Tensor) for value in (*temperatures, *biases, chosen, exclude)))
    return _Sides(sides[0], sides[1], implementation, ring, users)


def _dense_rows(function: Callable[..., Tensor], sides: _Sides, exclude: Tensor | None) -> Tensor:
    student, teacher = sides.student, sides.teacher
    scale = checked(
        student.scale, teacher.scale, student.bias, teacher.bias, None, exclude, len(student.key), sides.given
    )
    operands = (
        student.query,
        student.key,
        teacher.query,
        teacher.key,
        scale.reciprocal(),
        teacher.scale.reciprocal(),
    )
    return dense(function, *operands, student.bias, teacher.bias, exclude)


def _divergence_rows(sides: _Sides, exclude: Tensor | None, entropy: bool) -> Tensor:
    if sides.implementation == "reference":
        return _dense_rows(reference.sigma_kl if entropy else reference.soft_cross_entropy, sides, exclude)
    how = (sides.implementation, sides.given, sides.ring)
    lse, _, divergence = similarity_statistics(sides.student, sides.teacher, None, exclude, entropy, *how)
    return where_columns_are_left(divergence + lse, lse, exclude)


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

    Without `teacher_temperature` the teacher has the student's, as a constant: a temperature that is learnt
    has its gradient from the student alone. Pass it as `teacher_temperature` too if it shall move the
    teacher.

    >>> import torch
    >>> student, teacher = torch.eye(2), torch.eye(2).flip(0)
    >>> sigma_kl(student, student, teacher, student, temperature=1.0)
    tensor(0.4621)
    """
    check_choices(reduction, mode)
    sides = _sides(
        (student_query, student_key, teacher_query, teacher_key),
        (temperature, teacher_temperature),
        (student_bias, teacher_bias),
        exclude,
        (group, mode, implementation),
    )
    return reduced(_divergence_rows(sides, exclude_of(exclude, student_query), True), reduction)


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
    `sinkhorn_potentials`), and without detaching DISSL's. `teacher_temperature` as in `sigma_kl`.

    >>> import torch
    >>> prototypes = torch.eye(3)
    >>> soft_cross_entropy(prototypes, prototypes, prototypes, prototypes, temperature=1.0, teacher_temperature=0.1)
    tensor(0.5515)
    """
    check_choices(reduction, mode)
    sides = _sides(
        (student_query, student_key, teacher_query, teacher_key),
        (temperature, teacher_temperature),
        (student_bias, teacher_bias),
        exclude,
        (group, mode, implementation),
    )
    return reduced(_divergence_rows(sides, exclude_of(exclude, student_query), False), reduction)


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

    `teacher_temperature` as in `sigma_kl`.

    For a teacher that is at hand before the step, as in distillation; GeSSL's own self-motivated target is
    not, so its trainer calls `info_nce` and `sigma_kl` one after the other.

    >>> import torch
    >>> contrastive, sigma = gessl_loss(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2), temperature=1.0)
    >>> contrastive, sigma
    (tensor([0.3133, 0.3133]), tensor([0., 0.]))
    """
    check_choices("none", mode)
    check_pair(student_query, student_key, ("student_query", "student_key"))
    rank, _ = rank_and_size(group)
    chosen, positives = (
        positives,
        positives_of(positives, student_query, len(student_key), first=rank * len(student_key)),
    )
    sides = _sides(
        (student_query, student_key, teacher_query, teacher_key),
        (temperature, teacher_temperature),
        (student_bias, teacher_bias),
        exclude,
        (group, mode, implementation),
        LARGEST_STORED_GESSL,
        chosen,
    )
    excluded, student, given = exclude_of(exclude, student_query), sides.student, sides.given
    if sides.implementation == "reference":
        scale = checked(student.scale, None, None, None, positives, excluded, len(student.key), given)
        operands = (student.query, student.key, scale.reciprocal(), positives, excluded, student.bias)
        return dense(reference.info_nce, *operands), _dense_rows(reference.sigma_kl, sides, excluded)
    how = (sides.implementation, given, sides.ring)
    lse, positive, divergence = similarity_statistics(student, sides.teacher, positives, excluded, True, *how)
    return contrastive_rows(lse, positive, positives, excluded, given), where_columns_are_left(
        divergence + lse, lse, excluded
    )
