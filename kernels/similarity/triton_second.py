"""Triton kernels of the double backward: row moments, then the gradients by rows and by columns.

With tangents (ggQ, ggK, ggs, ggbias) of the student's operands, B = s·A + ggs·C + ggbias is the change of the
logits, A = ggQ·Kᵀ + Q·ggKᵀ, and

    H = w·P∘(B − b)          gQ = (s·H + ggs·G)K + s·G·ggK          gK = (s·H + ggs·G)ᵀQ + s·Gᵀ·ggQ          gs = Σ H∘C + Σ G∘A
    H_t = −t·P_t∘(B − b_t)   to the teacher's operands (OF_TEACHER)

The teacher's own tangents are left to `similarity.chunked`. Conventions and flags are those of
`similarity.triton_first`; BIAS includes ggbias.
"""

import triton
import triton.language as tl

from fastgessl.kernels.similarity.triton_first import (
    LOG2_E,
    add_positive,
    columns_open,
    dot,
    load_log2,
    load_matrix,
    load_weights,
    products,
    softmax_tile,
    store_gradient,
)


@triton.jit
def along(
    b_change,
    b_products,
    scale,
    tangent_scale,
    p_tangent_bias,
    o_n,
    N,
    BIAS: tl.constexpr,
    BY_ROWS: tl.constexpr,
):
    """B of a tile, from A and C."""
    b_along = scale * b_change + tangent_scale * b_products
    if BIAS:
        b_bias = tl.load(p_tangent_bias + o_n, mask=o_n < N, other=0.0)
        b_along += b_bias[None, :] if BY_ROWS else b_bias[:, None]
    return b_along


@triton.jit
def moments_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_teacher_lse, p_tangent_query, p_tangent_key, p_tangent_scale, p_tangent_bias,
    p_mean, p_positive, p_teacher_mean, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """b = E_P[B], B at the positive, b_t = E_{P_t}[B]: also the forward-mode derivative. Work: 3 matmul
    units, one more with a teacher."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale, tangent_scale = tl.load(p_scale), tl.load(p_tangent_scale)
    b_query = load_matrix(p_query, o_m, M, 0, D, CHUNK)
    b_moved = load_matrix(p_tangent_query, o_m, M, 0, D, CHUNK)
    b_lse = load_log2(p_lse, o_m, M)[:, None]
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    if POSITIVES:
        b_target = tl.load(p_positives + o_m, mask=o_m < M, other=-1)[:, None]
        b_positive = tl.zeros([BLOCK_M], tl.float32)
    if TEACHER:
        teacher_scale = tl.load(p_teacher_scale) * LOG2_E
        b_teacher_query = load_matrix(p_teacher_query, o_m, M, 0, E, TEACHER_CHUNK)
        b_teacher_lse = load_log2(p_teacher_lse, o_m, M)[:, None]
        b_teacher_mean = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        m_open = columns_open(o_n, N, p_exclude, o_m, M, EXCLUDE, True)
        b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
        b_tangent = load_matrix(p_tangent_key, o_n, N, 0, D, CHUNK)
        b_products = products(b_query, p_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION)
        b_change = products(
            b_moved, p_tangent_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION
        )
        b_change = products(
            b_query, p_query, o_m, M, b_tangent, p_tangent_key, o_n, N, b_change, D, CHUNK, PRECISION
        )
        b_along = along(b_change, b_products, scale, tangent_scale, p_tangent_bias, o_n, N, BIAS, True)
        _, b_softmax = softmax_tile(b_products, scale * LOG2_E, p_bias, o_n, N, b_lse, m_open, BIAS, True)
        b_mean += tl.sum(b_softmax * b_along, 1)
        if POSITIVES:
            b_positive += tl.sum(tl.where(o_n[None, :] == b_target, b_along, 0.0), 1)
        if TEACHER:
            b_teacher_key = load_matrix(p_teacher_key, o_n, N, 0, E, TEACHER_CHUNK)
            b_teacher_products = products(
                b_teacher_query, p_teacher_query, o_m, M, b_teacher_key, p_teacher_key, o_n, N, b_zero, E, TEACHER_CHUNK, PRECISION
            )  # fmt: skip
            _, b_softmax = softmax_tile(
                b_teacher_products,
                teacher_scale,
                p_teacher_bias,
                o_n,
                N,
                b_teacher_lse,
                m_open,
                TEACHER_BIAS,
                True,
            )
            b_teacher_mean += tl.sum(b_softmax * b_along, 1)
    tl.store(p_mean + o_m, b_mean, mask=o_m < M)
    if POSITIVES:
        tl.store(p_positive + o_m, b_positive, mask=o_m < M)
    if TEACHER:
        tl.store(p_teacher_mean + o_m, b_teacher_mean, mask=o_m < M)


@triton.jit
def curvature_rows_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_teacher_lse, p_tangent_query, p_tangent_key, p_tangent_scale, p_tangent_bias,
    p_weight_lse, p_weight_positive, p_weight_cross, p_mean, p_teacher_mean, p_factor, p_out, p_out_scale, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    OF_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor·gQ (factor·H_t·K_t), and the scale's gradient row by row. Work: 5 matmul units, one more with a
    teacher."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_chunk = tl.program_id(1)
    scale, tangent_scale = tl.load(p_scale), tl.load(p_tangent_scale)
    b_query = load_matrix(p_query, o_m, M, 0, D, CHUNK)
    b_moved = load_matrix(p_tangent_query, o_m, M, 0, D, CHUNK)
    if not OF_TEACHER:
        b_lse = load_log2(p_lse, o_m, M)[:, None]
        b_weight = load_weights(p_weight_lse, o_m, M, True)
        b_mean = load_weights(p_mean, o_m, M, True)
    if TEACHER:
        teacher_scale = tl.load(p_teacher_scale) * LOG2_E
        b_teacher_query = load_matrix(p_teacher_query, o_m, M, 0, E, TEACHER_CHUNK)
        b_teacher_lse = load_log2(p_teacher_lse, o_m, M)[:, None]
        b_cross = load_weights(p_weight_cross, o_m, M, True)
        if OF_TEACHER:
            b_teacher_mean = load_weights(p_teacher_mean, o_m, M, True)
    b_out = tl.zeros([BLOCK_M, TEACHER_CHUNK if OF_TEACHER else CHUNK], tl.float32)
    b_out_scale = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        m_open = columns_open(o_n, N, p_exclude, o_m, M, EXCLUDE, True)
        b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
        b_tangent = load_matrix(p_tangent_key, o_n, N, 0, D, CHUNK)
        b_products = products(b_query, p_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION)
        b_change = products(
            b_moved, p_tangent_query, o_m, M, b_key, p_key, o_n, N, b_zero, D, CHUNK, PRECISION
        )
        b_change = products(
            b_query, p_query, o_m, M, b_tangent, p_tangent_key, o_n, N, b_change, D, CHUNK, PRECISION
        )
        b_along = along(b_change, b_products, scale, tangent_scale, p_tangent_bias, o_n, N, BIAS, True)
        if TEACHER:
            b_teacher_key = load_matrix(p_teacher_key, o_n, N, 0, E, TEACHER_CHUNK)
            b_teacher_products = products(
                b_teacher_query, p_teacher_query, o_m, M, b_teacher_key, p_teacher_key, o_n, N, b_zero, E, TEACHER_CHUNK, PRECISION
            )  # fmt: skip
            _, b_teacher = softmax_tile(
                b_teacher_products,
                teacher_scale,
                p_teacher_bias,
                o_n,
                N,
                b_teacher_lse,
                m_open,
                TEACHER_BIAS,
                True,
            )
        if OF_TEACHER:
            b_bend = b_cross * b_teacher * (b_teacher_mean - b_along)
            b_out_scale += tl.sum(b_bend * b_teacher_products, 1)
            if TEACHER_CHUNK < E:
                b_teacher_key = load_matrix(p_teacher_key, o_n, N, i_chunk * TEACHER_CHUNK, E, TEACHER_CHUNK)
            b_out = dot(b_bend.to(b_teacher_key.dtype), b_teacher_key, b_out, PRECISION)
        else:
            _, b_softmax = softmax_tile(b_products, scale * LOG2_E, p_bias, o_n, N, b_lse, m_open, BIAS, True)
            b_gradient = b_weight * b_softmax
            b_bend = b_gradient * (b_along - b_mean)
            if POSITIVES:
                b_gradient = add_positive(b_gradient, p_positives, p_weight_positive, o_m, M, o_n, True)
            if TEACHER:
                b_gradient -= b_cross * b_teacher
            b_out_scale += tl.sum(b_bend * b_products + b_gradient * b_change, 1)
            if CHUNK < D:
                b_key = load_matrix(p_key, o_n, N, i_chunk * CHUNK, D, CHUNK)
                b_tangent = load_matrix(p_tangent_key, o_n, N, i_chunk * CHUNK, D, CHUNK)
            b_out = dot(
                (scale * b_bend + tangent_scale * b_gradient).to(b_key.dtype), b_key, b_out, PRECISION
            )
            b_out = dot((scale * b_gradient).to(b_key.dtype), b_tangent, b_out, PRECISION)
    if OF_TEACHER:
        store_gradient(p_out, b_out, p_out_scale, b_out_scale, p_factor, o_m, M, i_chunk, E, TEACHER_CHUNK)
    else:
        store_gradient(p_out, b_out, p_out_scale, b_out_scale, p_factor, o_m, M, i_chunk, D, CHUNK)


@triton.jit
def curvature_columns_kernel(
    p_query, p_key, p_scale, p_bias, p_teacher_query, p_teacher_key, p_teacher_scale, p_teacher_bias, p_positives, p_exclude,
    p_lse, p_teacher_lse, p_tangent_query, p_tangent_key, p_tangent_scale, p_tangent_bias,
    p_weight_lse, p_weight_positive, p_weight_cross, p_mean, p_teacher_mean, p_factor, p_out, p_out_bias, M, N,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, TEACHER_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE: tl.constexpr, BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    OF_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor·gK (factor·H_tᵀ·Q_t), and the bias's gradient; tiles are (columns, rows). Work: 5 matmul units,
    one more with a teacher."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_chunk = tl.program_id(1)
    scale, tangent_scale = tl.load(p_scale), tl.load(p_tangent_scale)
    b_key = load_matrix(p_key, o_n, N, 0, D, CHUNK)
    b_tangent = load_matrix(p_tangent_key, o_n, N, 0, D, CHUNK)
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
        b_moved = load_matrix(p_tangent_query, o_m, M, 0, D, CHUNK)
        b_products = products(b_key, p_key, o_n, N, b_query, p_query, o_m, M, b_zero, D, CHUNK, PRECISION)
        b_change = products(
            b_key, p_key, o_n, N, b_moved, p_tangent_query, o_m, M, b_zero, D, CHUNK, PRECISION
        )
        b_change = products(
            b_tangent, p_tangent_key, o_n, N, b_query, p_query, o_m, M, b_change, D, CHUNK, PRECISION
        )
        b_along = along(b_change, b_products, scale, tangent_scale, p_tangent_bias, o_n, N, BIAS, False)
        if TEACHER:
            b_cross = load_weights(p_weight_cross, o_m, M, False)
            b_teacher_query = load_matrix(p_teacher_query, o_m, M, 0, E, TEACHER_CHUNK)
            b_teacher_products = products(
                b_teacher_key, p_teacher_key, o_n, N, b_teacher_query, p_teacher_query, o_m, M, b_zero, E, TEACHER_CHUNK, PRECISION
            )  # fmt: skip
            b_teacher_lse = load_log2(p_teacher_lse, o_m, M)[None, :]
            _, b_teacher = softmax_tile(
                b_teacher_products,
                teacher_scale,
                p_teacher_bias,
                o_n,
                N,
                b_teacher_lse,
                m_open,
                TEACHER_BIAS,
                False,
            )
        if OF_TEACHER:
            b_bend = b_cross * b_teacher * (load_weights(p_teacher_mean, o_m, M, False) - b_along)
            if TEACHER_CHUNK < E:
                b_teacher_query = load_matrix(
                    p_teacher_query, o_m, M, i_chunk * TEACHER_CHUNK, E, TEACHER_CHUNK
                )
            b_out = dot(b_bend.to(b_teacher_query.dtype), b_teacher_query, b_out, PRECISION)
        else:
            b_lse = load_log2(p_lse, o_m, M)[None, :]
            _, b_softmax = softmax_tile(
                b_products, scale * LOG2_E, p_bias, o_n, N, b_lse, m_open, BIAS, False
            )
            b_gradient = load_weights(p_weight_lse, o_m, M, False) * b_softmax
            b_bend = b_gradient * (b_along - load_weights(p_mean, o_m, M, False))
            if POSITIVES:
                b_gradient = add_positive(b_gradient, p_positives, p_weight_positive, o_m, M, o_n, False)
            if TEACHER:
                b_gradient -= b_cross * b_teacher
            if CHUNK < D:
                b_query = load_matrix(p_query, o_m, M, i_chunk * CHUNK, D, CHUNK)
                b_moved = load_matrix(p_tangent_query, o_m, M, i_chunk * CHUNK, D, CHUNK)
            b_out = dot(
                (scale * b_bend + tangent_scale * b_gradient).to(b_query.dtype), b_query, b_out, PRECISION
            )
            b_out = dot((scale * b_gradient).to(b_query.dtype), b_moved, b_out, PRECISION)
        b_out_bias += tl.sum(b_bend, 1)
    if OF_TEACHER:
        store_gradient(p_out, b_out, p_out_bias, b_out_bias, p_factor, o_n, N, i_chunk, E, TEACHER_CHUNK)
    else:
        store_gradient(p_out, b_out, p_out_bias, b_out_bias, p_factor, o_n, N, i_chunk, D, CHUNK)
