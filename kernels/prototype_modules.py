"""DINO, SwAV and DISSL as modules over features and prototypes: no table of outputs is stored.

Their originals take the table (rows × prototypes); these take its two factors, the features and the last
layer's weight, and stream over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgessl.kernels.collectives import all_reduce_mean, check_equal_rows
from fastgessl.kernels.distillation import soft_cross_entropy
from fastgessl.kernels.modules import default_group
from fastgessl.kernels.prototypes import sinkhorn_potentials, softmax_marginal


class DINOLoss(nn.Module):
    """Self-distillation with a centred teacher, Caron et al. 2021, eq. (3) and (4).

    Cross-entropy from the teacher's softmax((t - c)/τ_t) to the student's, over all pairs of different views.
    The centre is the column bias -c/τ_t; c is a buffer that `update_center` moves, once after each optimiser
    step.

    >>> import torch
    >>> criterion = DINOLoss(output_dim=32)
    >>> teacher, student = torch.randn(2, 8, 16), torch.randn(4, 8, 16)
    >>> weight = torch.randn(32, 16)
    >>> loss = criterion(teacher, weight, student, weight)
    >>> criterion.update_center(teacher, weight)
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.teacher_temp, self.student_temp, self.center_momentum = (
            teacher_temp,
            student_temp,
            center_momentum,
        )
        self.register_buffer("center", torch.zeros(output_dim))

    def forward(
        self,
        teacher_features: Sequence[Tensor],
        teacher_prototypes: Tensor,
        student_features: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Features (N, D) of each view, the teacher's first; prototypes (K, D) -> ()."""
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        losses = [
            soft_cross_entropy(
                student, student_prototypes, teacher.detach(), teacher_prototypes.detach(),
                temperature=self.student_temp, teacher_temperature=temperature, teacher_bias=-self.center / temperature,
            )
            for i, teacher in enumerate(teacher_features) for j, student in enumerate(student_features) if i != j
        ]  # fmt: skip
        if not losses:
            raise ValueError(
                "DINOLoss needs a view of the student that is not the teacher's; found one view of each."
            )
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update_center(self, teacher_features: Sequence[Tensor], teacher_prototypes: Tensor) -> None:
        """c <- m·c + (1 - m)·mean output of the teacher over views and ranks. The mean of outputs is the
        output of the mean.

        Raises ValueError if the ranks hold unequal numbers of rows.
        """
        rows, group = torch.cat(list(teacher_features)), dist.group.WORLD if dist.is_initialized() else None
        if group is not None:
            check_equal_rows(rows, group, "teacher_features")
        # The centre stays float32: autocast would make the product bfloat16, which lerp_ refuses.
        with torch.autocast(rows.device.type, enabled=False):
            mean = all_reduce_mean(rows.to(self.center.dtype).mean(0), group)
            self.center.lerp_(teacher_prototypes.to(mean.dtype) @ mean, 1 - self.center_momentum)


class SwaVLoss(nn.Module):
    """Swapped prediction of balanced assignments, Caron et al. 2020, eq. (2); lightly's signature, with
    prototypes beside the features.

    Features and prototypes come normalised. Codes are computed on the high-resolution views, with a queue's
    rows if given, and carry no gradient.

    >>> import torch
    >>> views = torch.nn.functional.normalize(torch.randn(4, 8, 16), dim=2)
    >>> prototypes = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    >>> SwaVLoss()(views[:2], views[2:], prototypes).shape
    torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.iterations, self.epsilon = temperature, sinkhorn_iterations, sinkhorn_epsilon
        self.gather_distributed = sinkhorn_gather_distributed

    def forward(
        self,
        high_resolution_features: Sequence[Tensor],
        low_resolution_features: Sequence[Tensor],
        prototypes: Tensor,
        queue_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Features (N, D) of each view, prototypes (K, D), a queue (L, D) a high-resolution view -> ()."""
        views, group, losses = (
            [*high_resolution_features, *low_resolution_features],
            default_group(self.gather_distributed),
            [],
        )
        for i, target in enumerate(high_resolution_features):
            balanced = target if queue_features is None else torch.cat([target, queue_features[i]])
            bias = sinkhorn_potentials(
                balanced, prototypes, epsilon=self.epsilon, iterations=self.iterations, group=group
            )
            losses += [
                soft_cross_entropy(
                    view, prototypes, target.detach(), prototypes.detach(),
                    temperature=self.temperature, teacher_temperature=self.epsilon, teacher_bias=bias,
                )
                for j, view in enumerate(views) if j != i
            ]  # fmt: skip
        if not losses:
            raise ValueError("SwaVLoss needs a second view to predict the codes from; found one view in all.")
        return torch.stack(losses).mean()


class DISSLLoss(nn.Module):
    """Distillation to a teacher without stop-gradient, kept spread out by its mean assignment's entropy,
    Dubois et al. 2022, eq. (10).

    CE(p(x1), q(x2)) - λ·H[mean p(x1)] + β·CE(p(x1), p(x2)), averaged over both directions; p =
    softmax(teacher/τ_t), q = softmax(student/τ_s).

    >>> import torch
    >>> student, teacher = torch.randn(2, 8, 16), torch.randn(2, 8, 24)
    >>> DISSLLoss()(student, torch.randn(32, 16), teacher, torch.randn(32, 24)).shape
    torch.Size([])
    """

    def __init__(
        self,
        entropy_weight: float = 2.3,
        invariance_weight: float = 0.8,
        teacher_temperature: float = 0.5,
        student_temperature: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.entropy_weight, self.invariance_weight = entropy_weight, invariance_weight
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        self.gather_distributed = gather_distributed

    def forward(
        self,
        student_features: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher_features: Sequence[Tensor],
        teacher_prototypes: Tensor,
    ) -> Tensor:
        """Both views' features (N, D) and (N, E), the last layers' weights (K, D) and (K, E) -> ()."""
        directions = [
            self._direction(i, student_features, student_prototypes, teacher_features, teacher_prototypes)
            for i in (0, 1)
        ]
        return torch.stack(directions).mean()

    def _direction(
        self,
        i: int,
        student: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher: Sequence[Tensor],
        teacher_prototypes: Tensor,
    ) -> Tensor:
        target, other, warm = (teacher[i], teacher_prototypes), 1 - i, self.teacher_temperature
        distilled = soft_cross_entropy(
            student[other],
            student_prototypes,
            *target,
            temperature=self.student_temperature,
            teacher_temperature=warm,
        )
        invariant = soft_cross_entropy(teacher[other], teacher_prototypes, *target, temperature=warm)
        mean = softmax_marginal(*target, temperature=warm, group=default_group(self.gather_distributed))
        # A prototype that no row takes is 0 in float32, where the logarithm has no derivative.
        mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
        entropy = -(mean * mean.log()).sum()
        return distilled - self.entropy_weight * entropy + self.invariance_weight * invariant
