"""Triton kernels of the softmax over similarities: statistics, and their gradients by rows (queries) and by
columns (keys).

The mathematics and its notation stand in `similarity.chunked`. Every matrix is contiguous; statistics are
float32, natural logarithms outside and base 2 inside. Features are contracted in chunks of CHUNK, and the
output's chunk is the second grid axis, so that any width fits. No kernel accumulates into memory: results are
deterministic.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block in registers, i_ program index. Flags: POSITIVES, EXCLUDE
(number of excluded columns a row), BIAS, TEACHER, TEACHER_BIAS, ENTROPY (a of the notation), OF_TEACHER (the
gradient goes to the teacher's side).
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    if INTERPRETED:
        # The interpreter multiplies bfloat16 as raw 16-bit integers (3.6 to 3.9), silently wrong. The
        # products are exact in float32.
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), b_sum, input_precision=PRECISION)
    else:
        return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def load_matrix(p_matrix, o_rows, rows, first, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """RowWeights of a contiguous (rows, WIDTH) matrix, features first to first + CHUNK; 0 outside."""
    o_features = first + tl.arange(0, CHUNK)
    m_inside = (o_rows < rows)[:, None]
    if WIDTH % CHUNK != 0:
        m_inside = m_inside & (o_features < WIDTH)[None, :]
    return tl.load(
        p_matrix + o_rows.to(tl.int64)[:, None] * WIDTH + o_features[None, :], mask=m_inside, other=0.0
    )


@triton.jit
def store_matrix(p_matrix, b_values, o_rows, rows, first, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    o_features = first + tl.arange(0, CHUNK)
    m_inside = (o_rows < rows)[:, None] & (o_features < WIDTH)[None, :]
    p_rows = p_matrix + o_rows.to(tl.int64)[:, None] * WIDTH + o_features[None, :]
    tl.store(p_rows, b_values.to(p_matrix.dtype.element_ty), mask=m_inside)


@triton.jit
def store_gradient(
    p_out, b_out, p_sums, b_sums, p_factor, o_rows, rows, i_chunk, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """The program's chunk of factor·out, and, once, the sums of the rows."""
    store_matrix(p_out, b_out * tl.load(p_factor), o_rows, rows, i_chunk * CHUNK, WIDTH, CHUNK)
    if i_chunk == 0:
        tl.store(p_sums + o_rows, b_sums, mask=o_rows < rows)


@triton.jit
def products(
    b_left, p_left, o_left, lefts, b_right, p_right, o_right, rights, b_sum,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_sum + left·rightᵀ over all features; the first chunks come loaded."""
    # A tile is loaded once an iteration: each textual load gets buffers of its own (131,072 bytes of shared
    # memory against 81,920).
    b_sum = dot(b_left, tl.trans(b_right), b_sum, PRECISION)
    if CHUNK < WIDTH:
        for first in range(CHUNK, WIDTH, CHUNK):
            b_more = load_matrix(p_left, o_left, lefts, first, WIDTH, CHUNK)
            b_sum = dot(
                b_more, tl.trans(load_matrix(p_right, o_right, rights, first, WIDTH, CHUNK)), b_sum, PRECISION
            )
    return b_sum


@triton.jit
def load_log2(p_lse, o_rows, rows):
    """lse in base 2; +inf outside, so that the softmax is 0 there."""
    return tl.load(p_lse + o_rows, mask=o_rows < rows, other=float("inf")) * LOG2_E


@triton.jit
def columns_open(o_columns, N, p_exclude, o_rows, M, EXCLUDE: tl.constexpr, BY_ROWS: tl.constexpr):
    """Which (row, column) pairs take part; transposed if not BY_ROWS."""
    o_across = o_columns[None, :] if BY_ROWS else o_columns[:, None]
    m_open = o_across < N
    for i in tl.static_range(EXCLUDE):
        b_excluded = tl.load(p_exclude + o_rows * EXCLUDE + i, mask=o_rows < M, other=-1)
        m_open = m_open & (o_across != (b_excluded[:, None] if BY_ROWS else b_excluded[None, :]))
    return m_open


@triton.jit
def store_logsumexp(p_lse, p_correction, o_rows, rows, b_max, b_sum):
    """lse, and what exp(S - lse) is to be multiplied by to give P: 1 up to the rounding of what `load_log2`
    will read.
    """
    # "== 0", not "> 0": a NaN must come out as NaN.
    m_empty = b_sum == 0
    b_lse = tl.where(m_empty, -float("inf"), (b_max + tl.log2(b_sum)) * LN_2)
    b_above = tl.where(m_empty, 0.0, b_lse * LOG2_E) - tl.where(m_empty, 0.0, b_max)
    tl.store(p_lse + o_rows, b_lse, mask=o_rows < rows)
    tl.store(p_correction + o_rows, tl.where(m_empty, 1.0, tl.exp2(b_above) / b_sum), mask=o_rows < rows)


@triton.jit
def statistics_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_positive, p_correction, p_teacher_lse, p_teacher_correction, p_mean, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse, the logit at the positive, the teacher's lse and x, streaming over keys. Work: 1 matmul unit and 1
    pass of exp a softmax."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(p_scale) * LOG2_E
    b_query = load_matrix(p_query, o_m, M, 0, D, CHUNK)
    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if POSITIVES:
        b_target = tl.load(p_positives + o_m, mask=o_m < M, other=-1)[:, None]
        b_positive = tl.zeros([BLOCK_M], tl.float32)
    if TEACHER:
        teacher_scale = tl.load(p_teacher_scale) * LOG2_E
        b_teacher_query = load_matrix(p_teacher_query, o_m, M, 0, E, TEACHER_CHUNK)
        b_teacher_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_teacher_sum = tl.zeros([BLOCK_M], tl.float32)
        b_mean = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
        b_logits = (
            products(b_query, p_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION) * scale
        )
        if BIAS:
            b_logits += tl.load(p_bias + o_n, mask=o_n < N, other=0.0)[None, :] * LOG2_E
        m_open = columns_open(o_n, N, p_exclude, o_m, M, EXCLUDE, True)
        if POSITIVES:
            b_positive += tl.sum(tl.where(o_n[None, :] == b_target, b_logits, 0.0), 1)
        b_open = tl.where(m_open, b_logits, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_open, 1))
        b_finite = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_finite) + tl.sum(tl.exp2(b_open - b_finite[:, None]), 1)
        b_max = b_new
        if TEACHER:
            b_teacher_key = load_matrix(p_teacher_key, o_n, N, 0, E, TEACHER_CHUNK)
            b_teacher = products(
                b_teacher_query, p_teacher_query, o_m, M, b_teacher_key, p_teacher_key, o_n, N, b_zero, E, TEACHER_CHUNK, PRECISION
            ) * teacher_scale  # fmt: skip
            if TEACHER_BIAS:
                b_teacher += tl.load(p_teacher_bias + o_n, mask=o_n < N, other=0.0)[None, :] * LOG2_E
            b_ratio = b_teacher - b_logits if ENTROPY else -b_logits
            b_open = tl.where(m_open, b_teacher, -float("inf"))
            b_new = tl.maximum(b_teacher_max, tl.max(b_open, 1))
            b_finite = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_shrink = tl.exp2(b_teacher_max - b_finite)
            b_weight = tl.exp2(b_open - b_finite[:, None])
            b_teacher_sum = b_teacher_sum * b_shrink + tl.sum(b_weight, 1)
            b_mean = b_mean * b_shrink + tl.sum(b_weight * b_ratio, 1)
            b_teacher_max = b_new
    store_logsumexp(p_lse, p_correction, o_m, M, b_max, b_sum)
    if POSITIVES:
        tl.store(p_positive + o_m, b_positive * LN_2, mask=o_m < M)
    if TEACHER:
        store_logsumexp(p_teacher_lse, p_teacher_correction, o_m, M, b_teacher_max, b_teacher_sum)
        tl.store(p_mean + o_m, tl.where(b_teacher_sum == 0, 0.0, b_mean / b_teacher_sum * LN_2), mask=o_m < M)


@triton.jit
def symmetric_statistics_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_diagonal, p_correction, p_column_max, p_column_sum, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """lse of the rows, the diagonal, and what the columns' lse comes from, in one sweep. Work: 1 matmul unit
    and 2 passes of exp.

    A program takes every so many-th block of rows and keeps the maximum and sum (base 2) of each column over
    them in a row of its own of p_column_max and p_column_sum, (programs, N), which begin as -inf and 0.
    `merge_strips_kernel` makes the columns' lse of them.
    """
    i_strip = tl.program_id(0)
    scale = tl.load(p_scale) * LOG2_E
    p_column_max += i_strip.to(tl.int64) * N
    p_column_sum += i_strip.to(tl.int64) * N
    for i_m in range(i_strip * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_query = load_matrix(p_query, o_m, M, 0, D, CHUNK)
        b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_diagonal = tl.zeros([BLOCK_M], tl.float32)
        for i_n in range(0, N, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            b_zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
            b_logits = (
                products(b_query, p_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION) * scale
            )
            b_diagonal += tl.sum(tl.where(o_n[None, :] == o_m[:, None], b_logits, 0.0), 1)
            b_open = tl.where(o_n[None, :] < N, b_logits, -float("inf"))
            b_new = tl.maximum(b_max, tl.max(b_open, 1))
            b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_open - b_new[:, None]), 1)
            b_max = b_new
            b_open = tl.where(o_m[:, None] < M, b_logits, -float("inf"))
            b_top = tl.load(p_column_max + o_n, mask=o_n < N, other=0.0)
            b_highest = tl.maximum(b_top, tl.max(b_open, 0))
            b_total = tl.load(p_column_sum + o_n, mask=o_n < N, other=0.0) * tl.exp2(b_top - b_highest)
            tl.store(p_column_max + o_n, b_highest, mask=o_n < N)
            tl.store(
                p_column_sum + o_n, b_total + tl.sum(tl.exp2(b_open - b_highest[None, :]), 0), mask=o_n < N
            )
        store_logsumexp(p_lse, p_correction, o_m, M, b_max, b_sum)
        tl.store(p_diagonal + o_m, b_diagonal * LN_2, mask=o_m < M)
        # The next block of rows reads the columns' sums that other threads of this program have written.
        tl.debug_barrier()


@triton.jit
def merge_strips_kernel(
    p_column_max, p_column_sum, p_lse, p_correction, N, STRIPS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """lse of the columns and its correction from the strips' maxima and sums. A strip that no program took
    has -inf and 0.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_strips = tl.arange(0, STRIPS)[:, None].to(tl.int64) * N + o_n[None, :]
    b_top = tl.load(p_column_max + o_strips, mask=(o_n < N)[None, :], other=0.0)
    b_max = tl.max(b_top, 0)
    b_finite = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.load(p_column_sum + o_strips, mask=(o_n < N)[None, :], other=0.0)
    store_logsumexp(p_lse, p_correction, o_n, N, b_max, tl.sum(b_sum * tl.exp2(b_top - b_finite[None, :]), 0))


@triton.jit
def load_weights(p_weight, o_rows, rows, BY_ROWS: tl.constexpr):
    b_weight = tl.load(p_weight + o_rows, mask=o_rows < rows, other=0.0)
    return b_weight[:, None] if BY_ROWS else b_weight[None, :]


@triton.jit
def softmax_tile(b_products, scale, p_bias, o_n, N, b_lse, m_open, BIAS: tl.constexpr, BY_ROWS: tl.constexpr):
    """(logits, softmax) in base 2 of raw products."""
    b_logits = b_products * scale
    if BIAS:
        b_bias = tl.load(p_bias + o_n, mask=o_n < N, other=0.0) * LOG2_E
        b_logits += b_bias[None, :] if BY_ROWS else b_bias[:, None]
    return b_logits, tl.where(m_open, tl.exp2(b_logits - b_lse), 0.0)


@triton.jit
def add_positive(b_gradient, p_positives, p_weight_positive, o_m, M, o_n, BY_ROWS: tl.constexpr):
    # Inside the tile, before it is rounded: adding the positive afterwards loses about 3 digits in bfloat16
    # when P is nearly 1 there.
    b_target = tl.load(p_positives + o_m, mask=o_m < M, other=-1)
    b_weight = load_weights(p_weight_positive, o_m, M, BY_ROWS)
    m_target = o_n[None, :] == b_target[:, None] if BY_ROWS else o_n[:, None] == b_target[None, :]
    return tl.where(m_target, b_gradient + b_weight, b_gradient)


@triton.jit
def gradient_rows_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_teacher_lse, p_mean, p_weight_lse, p_weight_positive, p_weight_cross, p_mirror_lse, p_mirror_weight,
    p_factor, p_out, p_out_scale, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr, OF_TEACHER: tl.constexpr, MIRROR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = factor·G·K, and Σ_j G∘C of each row for the scale. Work: 2 matmul units, one more with a teacher.

    MIRROR adds the gradient of the columns' softmax in the same 2 units, as C serves both; without teacher
    and bias. 1: queries are the keys, the result is factor·(G + Gᵀ)·Q. 2: symmetric InfoNCE, whose columns
    have an lse and weights of their own.
    """
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_chunk = tl.program_id(1)
    scale = tl.load(p_scale) * LOG2_E
    b_query = load_matrix(p_query, o_m, M, 0, D, CHUNK)
    b_lse = load_log2(p_lse, o_m, M)[:, None]
    b_weight = load_weights(p_weight_lse, o_m, M, True)
    if TEACHER:
        teacher_scale = tl.load(p_teacher_scale) * LOG2_E
        b_teacher_query = load_matrix(p_teacher_query, o_m, M, 0, E, TEACHER_CHUNK)
        b_teacher_lse = load_log2(p_teacher_lse, o_m, M)[:, None]
        b_cross = load_weights(p_weight_cross, o_m, M, True)
        b_mean = load_weights(p_mean, o_m, M, True)
    b_out = tl.zeros([BLOCK_M, TEACHER_CHUNK if OF_TEACHER else CHUNK], tl.float32)
    b_out_scale = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        m_open = columns_open(o_n, N, p_exclude, o_m, M, EXCLUDE, True)
        b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
        b_products = products(b_query, p_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION)
        b_logits, b_softmax = softmax_tile(b_products, scale, p_bias, o_n, N, b_lse, m_open, BIAS, True)
        if not OF_TEACHER:
            b_gradient = b_weight * b_softmax
            if POSITIVES:
                b_gradient = add_positive(b_gradient, p_positives, p_weight_positive, o_m, M, o_n, True)
        if TEACHER:
            b_teacher_key = load_matrix(p_teacher_key, o_n, N, 0, E, TEACHER_CHUNK)
            b_teacher_products = products(
                b_teacher_query, p_teacher_query, o_m, M, b_teacher_key, p_teacher_key, o_n, N, b_zero, E, TEACHER_CHUNK, PRECISION
            )  # fmt: skip
            b_teacher, b_teacher_softmax = softmax_tile(
                b_teacher_products, teacher_scale, p_teacher_bias, o_n, N, b_teacher_lse, m_open, TEACHER_BIAS, True
            )  # fmt: skip
            if OF_TEACHER:
                b_ratio = (b_teacher - b_logits if ENTROPY else -b_logits) * LN_2 - b_mean
                b_gradient = b_cross * b_teacher_softmax * b_ratio
            else:
                b_gradient -= b_cross * b_teacher_softmax
        b_out_scale += tl.sum(b_gradient * (b_teacher_products if OF_TEACHER else b_products), 1)
        if MIRROR:
            m_open = columns_open(o_m, M, p_exclude, o_n, N, EXCLUDE, False)
            b_mirror_lse = load_log2(p_mirror_lse, o_n, N)[None, :]
            _, b_mirror = softmax_tile(b_products, scale, p_bias, o_n, N, b_mirror_lse, m_open, False, True)
            b_mirror *= load_weights(p_mirror_weight, o_n, N, False)
            if POSITIVES and MIRROR == 1:
                b_mirror = add_positive(b_mirror, p_positives, p_weight_positive, o_n, N, o_m, False)
            b_gradient += b_mirror
            if MIRROR == 2:
                b_out_scale += tl.sum(b_mirror * b_products, 1)
        if OF_TEACHER:
            if TEACHER_CHUNK < E:
                b_teacher_key = load_matrix(p_teacher_key, o_n, N, i_chunk * TEACHER_CHUNK, E, TEACHER_CHUNK)
            b_out = dot(b_gradient.to(b_teacher_key.dtype), b_teacher_key, b_out, PRECISION)
        else:
            if CHUNK < D:
                b_key = load_matrix(p_key, o_n, N, i_chunk * CHUNK, D, CHUNK)
            b_out = dot(b_gradient.to(b_key.dtype), b_key, b_out, PRECISION)
    if OF_TEACHER:
        store_gradient(p_out, b_out, p_out_scale, b_out_scale, p_factor, o_m, M, i_chunk, E, TEACHER_CHUNK)
    else:
        store_gradient(p_out, b_out, p_out_scale, b_out_scale, p_factor, o_m, M, i_chunk, D, CHUNK)


@triton.jit
def gradient_columns_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_teacher_lse, p_mean, p_weight_lse, p_weight_positive, p_weight_cross, p_factor, p_out, p_out_bias, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr, OF_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK = factor·Gᵀ·Q, and Σ_i G of each column for the bias; tiles are (columns, rows). Work: 2 matmul
    units, one more with a teacher."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_chunk = tl.program_id(1)
    scale = tl.load(p_scale) * LOG2_E
    b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
    if TEACHER:
        teacher_scale = tl.load(p_teacher_scale) * LOG2_E
        b_teacher_key = load_matrix(p_teacher_key, o_n, N, 0, E, TEACHER_CHUNK)
    b_out = tl.zeros([BLOCK_N, TEACHER_CHUNK if OF_TEACHER else CHUNK], tl.float32)
    b_out_bias = tl.zeros([BLOCK_N], tl.float32)
    for i_m in range(0, M, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        m_open = columns_open(o_n, N, p_exclude, o_m, M, EXCLUDE, False)
        b_query = load_matrix(p_query, o_m, M, 0, D, CHUNK)
        b_lse = load_log2(p_lse, o_m, M)[None, :]
        b_products = products(b_key, p_key, o_n, N, b_query, p_query, o_m, M, b_zero, D, CHUNK, PRECISION)
        b_logits, b_softmax = softmax_tile(b_products, scale, p_bias, o_n, N, b_lse, m_open, BIAS, False)
        if not OF_TEACHER:
            b_gradient = load_weights(p_weight_lse, o_m, M, False) * b_softmax
            if POSITIVES:
                b_gradient = add_positive(b_gradient, p_positives, p_weight_positive, o_m, M, o_n, False)
        if TEACHER:
            b_cross = load_weights(p_weight_cross, o_m, M, False)
            b_teacher_query = load_matrix(p_teacher_query, o_m, M, 0, E, TEACHER_CHUNK)
            b_teacher_products = products(
                b_teacher_key, p_teacher_key, o_n, N, b_teacher_query, p_teacher_query, o_m, M, b_zero, E, TEACHER_CHUNK, PRECISION
            )  # fmt: skip
            b_teacher_lse = load_log2(p_teacher_lse, o_m, M)[None, :]
            b_teacher, b_teacher_softmax = softmax_tile(
                b_teacher_products, teacher_scale, p_teacher_bias, o_n, N, b_teacher_lse, m_open, TEACHER_BIAS, False
            )  # fmt: skip
            if OF_TEACHER:
                b_ratio = (b_teacher - b_logits if ENTROPY else -b_logits) * LN_2 - load_weights(
                    p_mean, o_m, M, False
                )
                b_gradient = b_cross * b_teacher_softmax * b_ratio
            else:
                b_gradient -= b_cross * b_teacher_softmax
        b_out_bias += tl.sum(b_gradient, 1)
        if OF_TEACHER:
            if TEACHER_CHUNK < E:
                b_teacher_query = load_matrix(
                    p_teacher_query, o_m, M, i_chunk * TEACHER_CHUNK, E, TEACHER_CHUNK
                )
            b_out = dot(b_gradient.to(b_teacher_query.dtype), b_teacher_query, b_out, PRECISION)
        else:
            if CHUNK < D:
                b_query = load_matrix(p_query, o_m, M, i_chunk * CHUNK, D, CHUNK)
            b_out = dot(b_gradient.to(b_query.dtype), b_query, b_out, PRECISION)
    if OF_TEACHER:
        store_gradient(p_out, b_out, p_out_bias, b_out_bias, p_factor, o_n, N, i_chunk, E, TEACHER_CHUNK)
    else:
        store_gradient(p_out, b_out, p_out_bias, b_out_bias, p_factor, o_n, N, i_chunk, D, CHUNK)
