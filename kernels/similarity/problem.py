"""The mathematics of a softmax over similarities, and the tuples in which its operands and results are handed over.

Notation of `docs/kernels.md`: S = s·QKᵀ + bias, P = softmax of S over the columns that are not excluded, and
the same with an index t for the teacher. With R = a·S_t − S (a = 1 for KL, 0 for cross-entropy) each row has
the statistics

    lse = log Σ_j exp S_ij        positive = S_i,pos        x = E_{P_t}[R]        cross_term = x − a·lse_t

so that InfoNCE = lse − positive, KL(P_t‖P) and the cross-entropy = cross_term + lse. Their gradients, with
one weight a row and a statistic, are

    G   = w_lse·P + w_positive·[j = pos_i] − w_cross·P_t          (to the student's logits)
    G_t = w_cross·P_t∘(R − x)                                     (to the teacher's logits)

and along a direction (B, B_t) of the logits these change by

    H   = w_lse·P∘(B − b) − w_cross·P_t∘(B_t − e)                               b = E_P[B],  e = E_{P_t}[B_t]
    H_t = w_cross·P_t∘[(B_t − e)(R − x + a) − (B − b_t) − c]                    b_t = E_{P_t}[B],  c = E_{P_t}[B_t(R − x)]
"""

from typing import NamedTuple

from torch import Tensor

LOG2_E = 1.4426950408889634


class Side(NamedTuple):
    """One softmax: queries (M, D), keys (N, D), the 0-d scale 1/τ and a column bias (N,)."""

    query: Tensor
    key: Tensor
    scale: Tensor
    bias: Tensor | None


class SideValues(NamedTuple):
    """Tangents of a `Side`, or gradients to it: None for what does not move or is not wanted."""

    query: Tensor | None = None
    key: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None


class RowWeights(NamedTuple):
    """One number a row (M,) for each statistic: weights going in, derivatives coming out. Empty without
    positives, without a teacher.
    """

    lse: Tensor
    positive: Tensor
    cross_term: Tensor


class PairWeights(NamedTuple):
    """Weights (N,) of the statistics of symmetric InfoNCE: of the rows' lse, the columns' lse and the diagonal."""

    row: Tensor
    column: Tensor
    diagonal: Tensor


class Moments(NamedTuple):
    """Row sums (M,) that the second-order pass needs over all columns. Each is a plain sum, so shards of
    columns may be added.

    Empty without positives, without a teacher, and the last two where the teacher does not move.
    """

    student: Tensor
    """b = E_P[B]."""
    positive: Tensor
    """B at the positive."""
    student_under_teacher: Tensor
    """b_t = E_{P_t}[B]."""
    teacher: Tensor
    """e = E_{P_t}[B_t]."""
    covariance: Tensor
    """c = E_{P_t}[B_t(R − x)]."""

    def corrected(self, saved: "RowStatistics", rows: slice = slice(None)) -> "Moments":
        """Means over P of means over exp(S − lse)."""
        student, teacher = saved.correction[rows], saved.teacher_correction[rows]
        means = (part * teacher if len(part) else part for part in self[2:])
        return Moments(self.student * student, self.positive, *means)


class RowStatistics(NamedTuple):
    """What the forward pass gives, (M,) each; empty without positives, without a teacher."""

    lse: Tensor
    positive: Tensor
    cross_term: Tensor
    correction: Tensor
    """P is exp(S − lse) times this, 1 up to the rounding of lse."""
    teacher_lse: Tensor
    teacher_correction: Tensor
    teacher_mean: Tensor
    """x = E_{P_t}[R]."""

    def correct(self, weights: RowWeights) -> RowWeights:
        """Weights for exp(S − lse) instead of P. An lse of 100 is rounded to 4e-6 in float32, which P
        inherits as a relative error.

        Where P_pos is nearly 1 that is most of what is left of P_pos − 1: at τ = 0.01 the correction takes
        second derivatives from 3.7e-5 off to 4.8e-6, and gradients from 4.4e-6 to 1.5e-6 (256 rows of 64
        features).
        """
        cross_term = (
            weights.cross_term * self.teacher_correction if len(weights.cross_term) else weights.cross_term
        )
        return weights._replace(lse=weights.lse * self.correction, cross_term=cross_term)
