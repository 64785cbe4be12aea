"""Launching the Triton kernels: the same three functions as `similarity.chunked`, with the tiles of one
table.

`statistics`, `gradients` and `curvature` take and give exactly what their namesakes there do, so that either
may stand behind the operators.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgessl.kernels.similarity import chunked
from fastgessl.kernels.similarity import triton_first as first_order
from fastgessl.kernels.similarity import triton_second as second_order
from fastgessl.kernels.similarity.chunked import NOTHING
from fastgessl.kernels.similarity.problem import (
    Moments,
    PairWeights,
    RowStatistics,
    RowWeights,
    Side,
    SideValues,
)
from fastgessl.kernels.similarity.tiles import Tile, tile_for


class Operands(NamedTuple):
    """What every kernel begins with, and the flags that follow from it."""

    student: Side
    teacher: Side | None
    positives: Tensor | None
    exclude: Tensor | None

    def flags(self) -> dict[str, Any]:
        student, teacher = self.student, self.teacher
        return {
            "D": student.query.shape[1],
            "E": student.query.shape[1] if teacher is None else teacher.query.shape[1],
            "POSITIVES": self.positives is not None,
            "EXCLUDE": 0 if self.exclude is None else self.exclude.shape[1],
            "BIAS": student.bias is not None,
            "TEACHER": teacher is not None,
            "TEACHER_BIAS": teacher is not None and teacher.bias is not None,
            "PRECISION": "tf32x3" if student.query.dtype == torch.float32 else "ieee",
        }


def _side(side: Side) -> Side:
    """Contiguous matrices, and float32 for what statistics are made of."""
    return Side(
        side.query.contiguous(),
        side.key.contiguous(),
        side.scale.float(),
        None if side.bias is None else side.bias.float().contiguous(),
    )


def _operands(
    student: Side, teacher: Side | None, positives: Tensor | None, exclude: Tensor | None
) -> Operands:
    return Operands(
        _side(student),
        None if teacher is None else _side(teacher),
        None if positives is None else positives.contiguous(),
        None if exclude is None else exclude.contiguous(),
    )


def _launch(
    kernel: Any,
    operands: Operands,
    blocks: Callable[[Tile], int],
    width: int,
    arguments: tuple[Any, ...],
    flags: dict[str, Any],
) -> None:
    """`width` 0: a kernel without an output of features; otherwise its chunks are the second axis of the
    grid.
    """
    settings = {**operands.flags(), **flags}
    name, features = (
        kernel.__name__ + ("[mirror]" if flags.get("MIRROR") else ""),
        max(settings["D"], settings["E"]),
    )
    tile = tile_for(name, operands.student.query, features, settings["TEACHER"])
    chunk, teacher_chunk = tile.chunk(settings["D"]), tile.chunk(settings["E"])
    outputs = -(-width // (teacher_chunk if flags.get("OF_TEACHER") else chunk)) if width else 1
    query, key = operands.student[:2]
    pointers = (*operands.student, *(operands.teacher or (None,) * 4), *operands[2:])
    with _on(query.device):
        kernel[(blocks(tile), outputs)](
            *pointers, *arguments, len(query), len(key), **settings, CHUNK=chunk, TEACHER_CHUNK=teacher_chunk, BLOCK_M=tile.rows,
            BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _by_rows(operands: Operands) -> Callable[[Tile], int]:
    return lambda tile: -(-len(operands.student.query) // tile.rows)


def _by_columns(operands: Operands) -> Callable[[Tile], int]:
    return lambda tile: -(-len(operands.student.key) // tile.columns)


def statistics(
    student: Side, teacher: Side | None, positives: Tensor | None, exclude: Tensor | None, entropy: bool
) -> RowStatistics:
    """See `similarity.chunked.statistics`."""
    operands = _operands(student, teacher, positives, exclude)
    M, none = len(student.query), operands.student.scale.new_empty(0)
    lse = none.new_empty(M)
    positive = none if positives is None else none.new_empty(M)
    correction = none.new_empty(M)
    of_teacher = [none.new_empty(0 if teacher is None else M) for _ in range(3)]
    arguments = (lse, positive, correction, *of_teacher)
    _launch(first_order.statistics_kernel, operands, _by_rows(operands), 0, arguments, {"ENTROPY": entropy})
    teacher_lse, teacher_correction, mean = of_teacher
    cross_term = chunked.cross_term_of(mean, teacher_lse, exclude, entropy) if teacher else none
    return RowStatistics(lse, positive, cross_term, correction, teacher_lse, teacher_correction, mean)


def _normalized(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """Row weights in float32 and the factor taken out of them, None for 1.

    float16 reaches down to 6e-8 only: there the largest weight becomes 1.
    """
    wide = [weight.float().contiguous() for weight in weights]
    if dtype != torch.float16:
        return wide, None
    together = torch.cat(wide)
    factor = _largest(together)
    return list((together / factor).split([len(weight) for weight in wide])), factor


def _largest(values: Tensor) -> Tensor:
    """The largest size of an entry, 1 if there is none above 0."""
    largest = torch.linalg.vector_norm(values, torch.inf)
    return torch.where(largest > 0, largest, 1.0)


def _times(value: Tensor, factor: Tensor | None) -> Tensor:
    """At a few hundred rows a step is as long as its launches: what would multiply by 1 is left out."""
    return value if factor is None else value * factor


def _two_passes(
    kernels: tuple[Any, Any],
    operands: Operands,
    constants: tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]],
    factors: tuple[Tensor, Tensor | None],
    side: Side,
    needs: tuple[bool, ...],
    flags: tuple[dict[str, Any], dict[str, Any]],
) -> SideValues:
    """Gradients to one side by a pass over rows (query, scale) and one over columns (key, bias), each only
    where it is needed.

    `kernels`, `constants` and `flags` of both passes. `factors`: what the matrices are multiplied by inside
    the kernel, and the row and column sums outside.
    """
    inner, outer = factors
    (needs_query, needs_key, needs_scale, needs_bias), width = needs, side.query.shape[1]
    query = key = scale = bias = None
    if needs_query or needs_scale:
        query, rows = (
            torch.empty_like(side.query, memory_format=torch.contiguous_format),
            inner.new_empty(len(side.query)),
        )
        _launch(
            kernels[0], operands, _by_rows(operands), width, (*constants[0], inner, query, rows), flags[0]
        )
        scale = _times(rows.sum(), outer).to(side.scale.dtype) if needs_scale else None
    if needs_key or needs_bias:
        key, columns = (
            torch.empty_like(side.key, memory_format=torch.contiguous_format),
            inner.new_empty(len(side.key)),
        )
        _launch(
            kernels[1], operands, _by_columns(operands), width, (*constants[1], inner, key, columns), flags[1]
        )
        bias = _times(columns, outer) if needs_bias else None
    return SideValues(
        *(part if need else None for part, need in zip((query, key, scale, bias), needs, strict=True))
    )


def gradients(
    weights: RowWeights,
    student: Side,
    teacher: Side | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    saved: RowStatistics,
    entropy: bool,
    needs: tuple[bool, ...] = (True,) * 4,
    teacher_needs: tuple[bool, ...] = NOTHING,
    tied: bool = False,
) -> tuple[SideValues, SideValues]:
    """See `similarity.chunked.gradients`. Queries that are the keys, which have no bias, take one pass over
    rows instead of two passes.
    """
    operands = _operands(student, teacher, positives, exclude)
    corrected, factor = _normalized(saved.correct(weights), student.query.dtype)
    shared = (saved.lse, saved.teacher_lse, saved.teacher_mean, *corrected)
    constants = ((*shared, saved.lse, corrected[0]), shared)
    kernels = (first_order.gradient_rows_kernel, first_order.gradient_columns_kernel)
    if tied:
        needs = (needs[0], False, *needs[2:])
    to_student: dict[str, Any] = {"ENTROPY": entropy, "OF_TEACHER": False}
    flags = (to_student | {"MIRROR": int(tied)}, to_student)
    found = _two_passes(
        kernels, operands, constants, (_times(operands.student.scale, factor), factor), student, needs, flags
    )
    if operands.teacher is None or teacher is None or not any(teacher_needs):
        return found, SideValues()
    factors = (_times(operands.teacher.scale, factor), factor)
    to_teacher = to_student | {"OF_TEACHER": True}
    flags = (to_teacher | {"MIRROR": 0}, to_teacher)
    return found, _two_passes(kernels, operands, constants, factors, teacher, teacher_needs, flags)


# Programs of the symmetric forward: as many rows of column sums are held, 1 KiB a column.
STRIPS = 128
MERGED_COLUMNS = 32


def symmetric_statistics(
    image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `similarity.symmetric.chunked_statistics`."""
    operands = _operands(Side(image, text, scale, None), None, None, None)
    N, like = len(image), operands.student.scale
    lse, diagonal, correction = (like.new_empty(N) for _ in range(3))

    def strips(tile: Tile) -> int:
        return min(STRIPS, -(-N // tile.rows))

    top, total = like.new_full((STRIPS, N), -torch.inf), like.new_zeros(STRIPS, N)
    _launch(
        first_order.symmetric_statistics_kernel,
        operands,
        strips,
        0,
        (lse, diagonal, correction, top, total),
        {},
    )
    column_lse, column_correction = like.new_empty(N), like.new_empty(N)
    with _on(image.device):
        # One launch; as PyTorch's operations the merge was ten.
        first_order.merge_strips_kernel[(-(-N // MERGED_COLUMNS),)](
            top, total, column_lse, column_correction, N, STRIPS=STRIPS, BLOCK_N=MERGED_COLUMNS, num_warps=4
        )
    return lse, column_lse, diagonal, correction, column_correction


def symmetric_gradients(
    weights: PairWeights,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    lse: Tensor,
    column_lse: Tensor,
    needs: tuple[bool, ...],
) -> SideValues:
    """See `similarity.symmetric.chunked_gradients`: one pass a side, in which both softmaxes share the
    products.
    """
    (of_rows, of_columns, of_diagonal), factor = _normalized(weights, image.dtype)
    pairs = torch.arange(len(image), device=image.device)
    none = lse.new_empty(0)

    def to_rows(
        query: Tensor,
        key: Tensor,
        ours: tuple[Tensor, Tensor],
        theirs: tuple[Tensor, Tensor],
        needs_scale: bool,
    ) -> SideValues:
        operands = _operands(Side(query, key, scale, None), None, pairs, None)
        constants = (ours[0], none, none, ours[1], of_diagonal, none, *theirs)
        flags = {"ENTROPY": False, "OF_TEACHER": False, "MIRROR": 2}
        kernels = (first_order.gradient_rows_kernel, None)
        factors = (_times(operands.student.scale, factor), factor)
        return _two_passes(
            kernels,
            operands,
            (constants, ()),
            factors,
            operands.student,
            (True, False, needs_scale, False),
            (flags, {}),
        )

    rows, columns = (lse, of_rows), (column_lse, of_columns)
    first = to_rows(image, text, rows, columns, needs[2]) if needs[0] or needs[2] else SideValues()
    second = to_rows(text, image, columns, rows, False) if needs[1] else SideValues()
    return SideValues(first.query if needs[0] else None, second.query, first.scale, None)


def _tangents(tangent: SideValues, student: Side) -> tuple[SideValues, Tensor | None]:
    """Tangents with zeros for what is absent, and the factor taken out of them; as with weights, only float16
    needs one, else None.
    """
    scale = student.scale.float()
    query, key = (
        torch.zeros_like(operand) if part is None else part.contiguous()
        for part, operand in zip(tangent[:2], student[:2], strict=True)
    )
    small = scale.new_zeros(()) if tangent.scale is None else tangent.scale.float()
    bias = None
    if student.bias is not None:
        bias = (
            torch.zeros_like(student.bias, dtype=torch.float32)
            if tangent.bias is None
            else tangent.bias.float().contiguous()
        )
    if query.dtype != torch.float16:
        return SideValues(query, key, small, bias), None
    sizes = (
        torch.linalg.vector_norm(part, torch.inf).float()
        for part in (query, key, small, bias)
        if part is not None
    )
    factor = _largest(torch.stack(list(sizes)))
    query, key = ((part.float() / factor).to(part.dtype) for part in (query, key))
    return SideValues(query, key, small / factor, None if bias is None else bias / factor), factor


def curvature(
    tangent: SideValues,
    teacher_tangent: SideValues,
    weights: RowWeights,
    student: Side,
    teacher: Side | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    saved: RowStatistics,
    entropy: bool,
    needs: tuple[bool, ...] = (True,) * 4,
    teacher_needs: tuple[bool, ...] = NOTHING,
    moments: Moments | None = None,
    tied: bool = False,
) -> tuple[Moments, SideValues, SideValues]:
    """See `similarity.chunked.curvature`, which takes over where the teacher itself moves: not detached, at
    second order.
    """
    if any(part is not None for part in teacher_tangent):
        # The corrections belong to lse as these kernels round it on reading.
        saved = saved._replace(
            correction=torch.ones_like(saved.lse), teacher_correction=torch.ones_like(saved.lse)
        )
        return chunked.curvature(
            tangent,
            teacher_tangent,
            weights,
            student,
            teacher,
            positives,
            exclude,
            saved,
            entropy,
            needs,
            teacher_needs,
            moments,
            tied,
        )
    needs, tangent = (
        ((needs[0], needs[0], *needs[2:]), tangent._replace(key=tangent.query)) if tied else (needs, tangent)
    )
    operands = _operands(student, teacher, positives, exclude)
    corrected, factor = _normalized(saved.correct(weights), student.query.dtype)
    moved, tangent_factor = _tangents(tangent, student)
    sums = _moments(operands, saved, moved) if moments is None else moments
    if moments is not None and tangent_factor is not None:
        sums = Moments(*(part / tangent_factor for part in moments))
    shared = (saved.lse, saved.teacher_lse, *moved, *corrected, sums.student, sums.student_under_teacher)
    kernels = (second_order.curvature_rows_kernel, second_order.curvature_columns_kernel)
    outer = factor if tangent_factor is None else _times(tangent_factor, factor)
    inner = operands.student.scale.new_ones(()) if outer is None else outer
    found = _two_passes(
        kernels, operands, (shared, shared), (inner, outer), student, needs, ({"OF_TEACHER": False},) * 2
    )
    found = chunked.summed(found) if tied else found
    teacher_found = SideValues()
    if operands.teacher is not None and teacher is not None and any(teacher_needs):
        factors = (_times(operands.teacher.scale, outer), outer)
        teacher_found = _two_passes(
            kernels, operands, (shared, shared), factors, teacher, teacher_needs, ({"OF_TEACHER": True},) * 2
        )
    return Moments(*(_times(part, tangent_factor) for part in sums)), found, teacher_found


def _moments(operands: Operands, saved: RowStatistics, moved: SideValues) -> Moments:
    M, none = len(operands.student.query), operands.student.scale.new_empty(0)
    mean = none.new_empty(M)
    positive = none if operands.positives is None else none.new_empty(M)
    teacher_mean = none if operands.teacher is None else none.new_empty(M)
    arguments = (saved.lse, saved.teacher_lse, *moved, mean, positive, teacher_mean)
    _launch(second_order.moments_kernel, operands, _by_rows(operands), 0, arguments, {})
    return Moments(mean, positive, teacher_mean, none, none).corrected(saved)
