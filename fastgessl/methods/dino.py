"""DINO: distil a momentum teacher's centred and sharpened outputs into the student, from every crop.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, eq. (1) to (4), and its
code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.distributed import world_group
from fastgessl.kernels import swapped_cross_entropy
from fastgessl.kernels.collectives import all_reduce_mean
from fastgessl.methods.base import Outputs, RunFacts, Similarity, check_prototypes, register
from fastgessl.methods.momentum import MomentumMethod
from fastgessl.models import BottleneckHead, apply_head, encode, feature_width
from fastgessl.schedules import linear_warmup


@dataclass(frozen=True)
class Teacher:
    """The teacher's distribution over outputs, in factors: softmax((rows · prototypes - centre) /
    temperature).
    """

    rows: Tensor
    """(2, N, D), unit."""
    prototypes: Tensor
    """(K, D), unit."""
    center: Tensor
    """(K,)."""
    temperature: Tensor
    """()."""


@register("dino")
class DINO(MomentumMethod):
    """Two views and, if asked for, smaller ones, which only the student sees. Head: bottleneck of unit
    length, last layer with weight norm and gain 1. State: the momentum teacher, the centre of its outputs,
    its temperature.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> from fastgessl.config import DinoConfig
    >>> own = DinoConfig(prototypes=32)
    >>> config = MethodConfig(name="dino", projector_hidden=16, projector_out=4, dino=own)
    >>> method = DINO(config, backbone, RunFacts(total_steps=100))
    >>> views = [torch.randn(5, 3, 2, 2) for _ in range(4)]
    >>> out, teacher = method(views), method.targets(views)
    >>> tuple(out.projections.shape), tuple(out.prototypes.shape), tuple(teacher.rows.shape)
    ((4, 5, 4), (32, 4), (2, 5, 4))
    >>> tuple(method.loss(out, teacher).shape)
    ()
    """

    followed = ("backbone", "projector", "last_layer")
    momentum_last_layer: nn.Linear
    center: Tensor
    teacher_temperature: Tensor

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        check_prototypes("method.dino.prototypes", config.dino.prototypes, facts)
        self.projector = BottleneckHead(
            feature_width(backbone), config.projector_hidden, config.projector_out, norm=config.dino.head_norm
        )
        self.last_layer = nn.Linear(config.projector_out, config.dino.prototypes, bias=False)
        self.copy_parts(config, facts)
        warmup = round(config.dino.teacher_warmup_epochs * facts.steps_per_epoch)
        # One more than there are steps: the temperature is set for the step to come.
        self.temperatures = linear_warmup(
            config.dino.teacher_temperature_start,
            config.dino.teacher_temperature,
            facts.total_steps + 1,
            warmup_steps=warmup,
        ).tolist()
        self.register_buffer("center", torch.zeros(config.dino.prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(self.temperatures[0]))
        self.center_momentum = config.dino.center_momentum
        self.frozen_steps = round(config.dino.freeze_epochs * facts.steps_per_epoch)

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Views, or their features (V, N, F) -> the student's unit projections (V, N, D) and unit last layer
        (K, D).
        """
        features = encode(self.backbone, views, features)
        projections = normalize(apply_head(self.projector, features), dim=-1)
        return Outputs(features, projections, prototypes=normalize(self.last_layer.weight, dim=-1))

    @torch.no_grad()
    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Teacher:
        """The teacher on the two views of full size, with the centre and temperature of this step."""
        rows = normalize(self.momentum_projections(views[: self.views_per_sample]), dim=-1)
        return Teacher(
            rows, normalize(self.momentum_last_layer.weight, dim=-1), self.center, self.teacher_temperature
        )

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """Cross-entropy from the teacher's softmax on one view to the student's on another, averaged over
        pairs of views. Returns ().
        """
        assert out.prototypes is not None
        return swapped_cross_entropy(
            out.projections,
            out.prototypes,
            aux.rows,
            aux.prototypes,
            temperature=self.temperature,
            teacher_temperature=aux.temperature,
            teacher_biases=(-aux.center / aux.temperature).expand(len(aux.rows), -1),
        )

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task: the student's softmax of every view over the outputs."""
        assert out.prototypes is not None
        return (Similarity(out.projections.flatten(0, 1), out.prototypes, self.temperature),)

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """The last layer, in the first epochs."""
        return self.last_layer.parameters() if step < self.frozen_steps else ()

    @torch.no_grad()
    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """The centre moves towards the teacher's mean output over all ranks, the teacher follows the student,
        the temperature goes on.

        State is replaced and not written to: `targets` hands it out."""
        if passes:
            row = torch.stack([teacher.rows.mean((0, 1)) for _, teacher in passes]).mean(0)
            # The mean of outputs is the output of the mean: the last layer is linear.
            mean = passes[0][1].prototypes @ all_reduce_mean(row, world_group())
            self.center = torch.lerp(mean, self.center, self.center_momentum)
        self.teacher_temperature = torch.full_like(self.teacher_temperature, self.temperatures[step + 1])
        super().update_state(passes, step)
