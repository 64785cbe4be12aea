"""The softmax over similarities in PyTorch, by blocks of rows: any device, any floating dtype, O(block·N) memory.

The mathematics and its notation are in `similarity.problem`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgessl.kernels.reference import accumulation_dtype
from fastgessl.kernels.similarity.problem import LOG2_E, Moments, RowStatistics, RowWeights, Side, SideValues

# Logits of one block, 1 MiB of float32, stay in the cache of a core; blocks of fewer rows starve the matmuls
# (bench/test_losses.py).
BLOCK_ELEMENTS = 1 << 18
# On a GPU, 64 MiB of float32, so that an operation on a block lasts longer than its launch; not yet measured
# on one. At most 17 blocks are held at once (second order with a teacher that moves; InfoNCE's second order
# 7, backward 5): 1.1 GiB, in float64 2.1.
GPU_BLOCK_ELEMENTS = 1 << 24
BLOCK_ROWS = 128
NOTHING = (False,) * 4


def rows_of_block(columns: int, device: torch.device) -> int:
    """How many rows a block of logits (rows, columns) has: what its number of elements allows, at least BLOCK_ROWS."""
    return max(BLOCK_ROWS, (BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS) // columns)


def row_blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """The rows of query (M, D) block by block, for a table with key (N, D).

    >>> [(rows.start, rows.stop) for rows in row_blocks(torch.empty(300, 4), torch.empty(4096, 4))]
    [(0, 128), (128, 256), (256, 300)]
    """
    rows, step = len(query), rows_of_block(len(key), query.device)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _wide(side: Any, dtype: torch.dtype) -> Any:
    """The same side, or tangents of one, in the dtype in which sums are taken; None stays None."""
    wide = accumulation_dtype(dtype)
    return None if side is None else type(side)(*(None if part is None else part.to(wide) for part in side))


def _logits(side: Side, rows: slice) -> Tensor:
    """(B, N) = s·q·kᵀ + bias. The scale goes onto the queries: one pass fewer over the block."""
    query = side.query[rows] * side.scale
    return query @ side.key.T if side.bias is None else torch.addmm(side.bias, query, side.key.T)


def fill_excluded(block: Tensor, exclude: Tensor | None, value: float) -> Tensor:
    """Write `value` where a column is excluded, in place. `exclude` (B, 1 or 2), -1 = none."""
    if exclude is None:
        return block
    for column in exclude.unsqueeze(-1).unbind(1):
        index = column.clamp(min=0)
        block.scatter_(1, index, torch.where(column >= 0, value, block.gather(1, index)))
    return block


def exp_(logits: Tensor) -> Tensor:
    # In place, through exp2: on AVX-512 torch spends 0.32 ns an element on exp2 and 0.82 ns on exp, and a
    # product 0.09 ns.
    return logits.mul_(LOG2_E).exp2_()


def _logsumexp(logits: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N) -> lse and correction (B,) over the columns that are not excluded, destroying `logits`. A row
    without columns gives -inf.
    """
    top = fill_excluded(logits, exclude, -torch.inf).amax(1, keepdim=True)
    if exclude is not None:
        top.masked_fill_(top == -torch.inf, 0.0)
    return rounded_logsumexp(top[:, 0], exp_(logits.sub_(top)).sum(1))


def rounded_logsumexp(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """top + log(total), and the correction for its rounding: exp(S − top)/total is exp(S − lse) times it."""
    lse = total.log() + top
    return lse, (lse - top).exp_().div_(total).masked_fill_(total == 0, 1.0)


def _softmax(logits: Tensor, lse: Tensor, exclude: Tensor | None) -> Tensor:
    """exp(logits - lse) with 0 at excluded columns; in rows that have none left these are all, whatever exp
    gives there.
    """
    return fill_excluded(exp_(logits - lse[:, None]), exclude, 0.0)


def _part(vector: Tensor | None, rows: slice) -> Tensor | None:
    return None if vector is None else vector[rows]


def _at_positive(block: Tensor, positives: Tensor) -> Tensor:
    """(B, N) -> (B,): the entry at the positive, 0 where there is none (-1)."""
    return block.gather(1, positives.clamp(min=0)[:, None])[:, 0].masked_fill(positives < 0, 0.0)


def cross_term_of(mean: Tensor, teacher_lse: Tensor, exclude: Tensor | None, entropy: bool) -> Tensor:
    """x − a·lse_t; 0 in rows whose columns are all excluded."""
    cross_term = mean - teacher_lse if entropy else mean
    return cross_term if exclude is None else cross_term.masked_fill(teacher_lse == -torch.inf, 0.0)


def statistics(
    student: Side, teacher: Side | None, positives: Tensor | None, exclude: Tensor | None, entropy: bool
) -> RowStatistics:
    """Row statistics of both softmaxes. `entropy` is a: True for KL, False for cross-entropy."""
    wide, wide_teacher = (_wide(side, student.query.dtype) for side in (student, teacher))
    M, has_teacher = len(wide.query), teacher is not None
    # Written into, not collected: small results kept between blocks split the heap's holes, 2.2 GiB at 32,768
    # rows instead of 0.1.
    sizes = (
        M,
        0 if positives is None else M,
        M if has_teacher else 0,
        M,
        *(M if has_teacher else 0 for _ in range(3)),
    )
    result = RowStatistics(*(wide.scale.new_empty(size) for size in sizes))
    for rows in row_blocks(wide.query, wide.key):
        excluded = _part(exclude, rows)
        logits = _logits(wide, rows)
        if positives is not None:
            result.positive[rows] = _at_positive(logits, positives[rows])
        if wide_teacher is not None:
            teacher_logits = _logits(wide_teacher, rows)
            ratio = teacher_logits - logits if entropy else -logits
            teacher_lse, correction = _logsumexp(teacher_logits.clone(), excluded)
            mean = _softmax(teacher_logits, teacher_lse, excluded).mul_(ratio).sum(1).mul_(correction)
            result.teacher_lse[rows], result.teacher_correction[rows], result.teacher_mean[rows] = (
                teacher_lse,
                correction,
                mean,
            )
            result.cross_term[rows] = cross_term_of(mean, teacher_lse, excluded, entropy)
        result.lse[rows], result.correction[rows] = _logsumexp(logits, excluded)
    return result


class _Tile(NamedTuple):
    """One softmax of a block of rows and the gradient of the weighted statistics to its logits, (B, N) each.

    A teacher's last two are empty unless it moves or is asked for; a student has no ratio.
    """

    probability: Tensor
    gradient: Tensor
    ratio: Any = None
    """R − x, (B, N)."""


def _tiles(
    rows: slice,
    weights: RowWeights,
    student: Side,
    teacher: Side | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    saved: RowStatistics,
    entropy: bool,
    of_teacher: bool,
) -> tuple[_Tile, _Tile | None]:
    excluded = _part(exclude, rows)
    logits = _logits(student, rows)
    probability = _softmax(logits, saved.lse[rows], excluded)
    gradient = probability * weights.lse[rows, None]
    if positives is not None:
        positive = positives[rows]
        weight = weights.positive[rows].masked_fill(positive < 0, 0.0)
        gradient.scatter_add_(1, positive.clamp(min=0)[:, None], weight[:, None])
    if teacher is None:
        return _Tile(probability, gradient), None
    teacher_logits = _logits(teacher, rows)
    teacher_probability = _softmax(teacher_logits, saved.teacher_lse[rows], excluded)
    if not of_teacher:
        none = gradient.new_empty(0)
        gradient.addcmul_(teacher_probability, weights.cross_term[rows, None], value=-1)
        return _Tile(probability, gradient), _Tile(teacher_probability, none, none)
    weighted = teacher_probability * weights.cross_term[rows, None]
    gradient -= weighted
    ratio = (teacher_logits - logits if entropy else -logits) - saved.teacher_mean[rows, None]
    return _Tile(probability, gradient), _Tile(teacher_probability, weighted.mul_(ratio), ratio)


def _zeros(side: Side, needs: tuple[bool, ...]) -> SideValues:
    """Zeros in the accumulation dtype for what is needed, None for the rest."""
    return SideValues(
        *(
            torch.zeros_like(part) if need and part is not None else None
            for part, need in zip(side, needs, strict=True)
        )
    )


def _pull_back(side: Side, gradient: Tensor, rows: slice, out: SideValues) -> None:
    """Add one block's gradient to the logits into the gradients of the operands."""
    query = side.query[rows]
    if out.query is not None or out.scale is not None:
        through_key = gradient @ side.key
        if out.query is not None:
            out.query[rows] = through_key * side.scale
        if out.scale is not None:
            # Σ G∘C row by row is q·(GK): no second pass over the block.
            out.scale.add_((through_key * query).sum())
    if out.key is not None:
        out.key.addmm_(gradient.T, query * side.scale)
    if out.bias is not None:
        out.bias.add_(gradient.sum(0))


def summed(out: SideValues) -> SideValues:
    """The gradient of queries that are the keys, at the query."""
    return out if out.query is None or out.key is None else out._replace(query=out.query + out.key, key=None)


def _rounded(out: SideValues, side: Side) -> SideValues:
    dtypes = (side.query.dtype, side.key.dtype, side.scale.dtype, side.scale.dtype)
    return SideValues(
        *(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(out, dtypes, strict=True)
        )
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
    """Gradients of Σ_i weights·statistics to the operands of student and teacher; what is not needed is None.

    `tied`: the student's queries are its keys; their gradient is the sum of both and stands at the query.
    """
    if tied and teacher is None and student.bias is None:
        return tied_gradients(
            weights, student.query, student.scale, positives, exclude, saved, needs
        ), SideValues()
    wide, wide_teacher = (_wide(side, student.query.dtype) for side in (student, teacher))
    needs, weights = (needs[0], needs[0], *needs[2:]) if tied else needs, saved.correct(weights)
    out, teacher_out = (
        _zeros(wide, needs),
        SideValues() if wide_teacher is None else _zeros(wide_teacher, teacher_needs),
    )
    for rows in row_blocks(wide.query, wide.key):
        tile, teacher_tile = _tiles(
            rows, weights, wide, wide_teacher, positives, exclude, saved, entropy, any(teacher_needs)
        )
        _pull_back(wide, tile.gradient, rows, out)
        if wide_teacher is not None and teacher_tile is not None and any(teacher_needs):
            _pull_back(wide_teacher, teacher_tile.gradient, rows, teacher_out)
    out = summed(out) if tied else out
    return _rounded(out, student), teacher_out if teacher is None else _rounded(teacher_out, teacher)


def tied_gradients(
    weights: RowWeights,
    query: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    exclude: Tensor | None,
    saved: RowStatistics,
    needs: tuple[bool, ...],
) -> SideValues:
    """Gradients to queries that are their own keys, and to the scale, without bias and teacher.

    Column j's softmax is that of row j there, so that the gradient (G + Gᵀ)·Q of weighted lse and positives takes
    1 + 1 matmul units instead of 1 + 2.
    """
    rows_of, lse, weight_lse = (
        query.to(accumulation_dtype(query.dtype)),
        saved.lse,
        weights.lse * saved.correction,
    )
    finite = lse if exclude is None else lse.masked_fill(lse == -torch.inf, torch.inf)
    out, out_scale = torch.empty_like(rows_of), torch.zeros_like(scale)
    for rows in row_blocks(query, query):
        logits = (rows_of[rows] * scale) @ rows_of.T
        mirrored = exp_(logits - finite)
        gradient = exp_(logits.sub_(finite[rows, None])).mul_(weight_lse[rows, None])
        if exclude is not None:
            _fill_pairs(gradient, exclude, rows, mirrored)
        gradient.addcmul_(mirrored, weight_lse)
        if positives is not None:
            _add_pairs(gradient, positives, weights.positive, rows)
        through = gradient @ rows_of
        if needs[2]:
            out_scale.add_((through * rows_of[rows]).sum() / 2)  # Σ (G + Gᵀ)∘C counts each pair twice
        out[rows] = through * scale
    return SideValues(out.to(query.dtype) if needs[0] else None, None, out_scale if needs[2] else None)


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


def _direction(side: Side, tangent: SideValues, rows: slice) -> Tensor | None:
    """B = s·(ggQ·Kᵀ + Q·ggKᵀ) + ggs·C + ggbias, the change of the logits along a tangent, absent parts being
    0. None if nothing moves.
    """
    if all(part is None for part in tangent):
        return None
    query = side.query[rows]
    moved = torch.zeros_like(query)
    if tangent.query is not None:
        moved = moved + tangent.query[rows] * side.scale
    if tangent.scale is not None:
        moved = moved + query * tangent.scale
    direction = moved @ side.key.T
    if tangent.key is not None:
        direction.addmm_(query * side.scale, tangent.key.T)
    return direction if tangent.bias is None else direction.add_(tangent.bias)


def _second_pull_back(
    side: Side, tangent: SideValues, gradient: Tensor, change: Tensor, rows: slice, out: SideValues
) -> None:
    """Add one block's share of d/d(operands) of ⟨tangent, first-order gradient⟩; `change` is H, `gradient` is
    G.
    """
    query, moved = side.query[rows], _part(tangent.query, rows)
    if out.query is not None or out.scale is not None:
        through_key = change @ side.key
        if tangent.key is not None:
            through_key.addmm_(gradient, tangent.key)
        if out.query is not None:
            out.query[rows] = through_key * side.scale
        if out.scale is not None:
            out.scale.add_((through_key * query).sum())
        if out.query is not None and tangent.scale is not None:
            out.query[rows] += (gradient @ side.key) * tangent.scale
        if out.scale is not None and moved is not None:
            out.scale.add_(((gradient @ side.key) * moved).sum())
    if out.key is not None:
        out.key.addmm_(change.T, query * side.scale)
        if moved is not None:
            out.key.addmm_(gradient.T, moved * side.scale)
        if tangent.scale is not None:
            out.key.addmm_(gradient.T, query * tangent.scale)
    if out.bias is not None:
        out.bias.add_(change.sum(0))


def _row_moments(
    tile: _Tile,
    teacher: _Tile | None,
    direction: Tensor,
    teacher_direction: Tensor | None,
    positives: Tensor | None,
) -> Moments:
    none = direction.new_empty(0)
    positive = none if positives is None else _at_positive(direction, positives)
    student, under_teacher, mean, covariance = (tile.probability * direction).sum(1), none, none, none
    if teacher is not None:
        under_teacher = (teacher.probability * direction).sum(1)
        if teacher_direction is not None:
            moved = teacher.probability * teacher_direction
            mean, covariance = moved.sum(1), (moved * teacher.ratio).sum(1)
    return Moments(student, positive, under_teacher, mean, covariance)


def _changes(
    rows: slice,
    weights: RowWeights,
    tile: _Tile,
    teacher: _Tile | None,
    moments: Moments,
    direction: Tensor,
    teacher_direction: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """(H, H_t) of the module's docstring."""
    change = tile.probability * (direction - moments.student[:, None]) * weights.lse[rows, None]
    if teacher is None:
        return change, None
    weighted = teacher.probability * weights.cross_term[rows, None]
    inner = moments.student_under_teacher[:, None] - direction
    if teacher_direction is not None:
        centred = teacher_direction - moments.teacher[:, None]
        change = change - weighted * centred
        inner = inner + centred * (teacher.ratio + float(entropy)) - moments.covariance[:, None]
    return change, weighted * inner


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
    """Derivatives of ⟨tangent, gradients(...)⟩: the row moments (see `row_derivatives`) and the gradients to
    both sides' operands.

    Given `moments` replace this call's own: a ring passes the sums over all shards of the keys. `tied` as in
    `gradients`; the tangent of the queries is then also that of the keys.
    """
    needs, tangent = (
        ((needs[0], needs[0], *needs[2:]), tangent._replace(key=tangent.query)) if tied else (needs, tangent)
    )
    wide, wide_teacher, tangent, teacher_tangent = (
        _wide(side, student.query.dtype) for side in (student, teacher, tangent, teacher_tangent)
    )
    weights = saved.correct(weights)
    out, teacher_out = (
        _zeros(wide, needs),
        SideValues() if wide_teacher is None else _zeros(wide_teacher, teacher_needs),
    )
    M = len(wide.query)
    moved = M if any(part is not None for part in teacher_tangent) else 0
    of_teacher = any(teacher_needs) or moved > 0
    sizes = (M, 0 if positives is None else M, 0 if teacher is None else M, moved, moved)
    own = Moments(*(wide.scale.new_empty(size) for size in sizes)) if moments is None else moments
    for rows in row_blocks(wide.query, wide.key):
        tile, teacher_tile = _tiles(
            rows, weights, wide, wide_teacher, positives, exclude, saved, entropy, of_teacher
        )
        moving = _direction(wide, tangent, rows)
        direction = torch.zeros_like(tile.probability) if moving is None else moving
        teacher_direction = None if wide_teacher is None else _direction(wide_teacher, teacher_tangent, rows)
        if moments is None:
            sums = _row_moments(
                tile, teacher_tile, direction, teacher_direction, _part(positives, rows)
            ).corrected(saved, rows)
            for total, part in zip(own, sums, strict=True):
                total[rows] = part
        else:
            sums = Moments(*(part[rows] for part in moments))
        if not any(needs) and not any(teacher_needs):
            continue
        change, teacher_change = _changes(
            rows, weights, tile, teacher_tile, sums, direction, teacher_direction, entropy
        )
        _second_pull_back(wide, tangent, tile.gradient, change, rows, out)
        if (
            wide_teacher is not None
            and teacher_tile is not None
            and teacher_change is not None
            and of_teacher
        ):
            _second_pull_back(
                wide_teacher, teacher_tangent, teacher_tile.gradient, teacher_change, rows, teacher_out
            )
    out = summed(out) if tied else out
    return own, _rounded(out, student), teacher_out if teacher is None else _rounded(teacher_out, teacher)


def row_derivatives(moments: Moments) -> RowWeights:
    """Directional derivatives of (lse, positive, cross_term): b, B at the positive, c − b_t."""
    moved = moments.covariance if len(moments.covariance) else torch.zeros_like(moments.student_under_teacher)
    return RowWeights(moments.student, moments.positive, moved - moments.student_under_teacher)
