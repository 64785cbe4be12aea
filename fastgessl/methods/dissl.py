"""DISSL: distil an MLP teacher's assignment of images to many classes into a linear student, with all classes
kept in use.

Dubois et al., "Improving Self-Supervised Learning by Characterizing Idealized Representations", NeurIPS 2022,
eq. (10).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fastgessl.config import MethodConfig
from fastgessl.kernels import dissl_loss
from fastgessl.methods.assignments import assignment_measures
from fastgessl.methods.base import Outputs, ProjectedMethod, RunFacts, Similarity, check_prototypes, register
from fastgessl.models import Projector, apply_head, at_least_float32, encode, feature_width


@register("dissl")
class DISSL(ProjectedMethod):
    """Two views and, if asked for, smaller ones; a linear student over the representation itself, an MLP
    teacher. No stop-gradient, no momentum encoder, no state: the entropy of the mean assignment, over the
    images of all ranks, keeps it from collapsing.

    The teacher assigns the two views of full size; the student predicts each assignment from every other
    view.

    >>> import torch
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> from fastgessl.config import DisslConfig
    >>> own = DisslConfig(prototypes=32)
    >>> config = MethodConfig(name="dissl", projector_hidden=16, projector_out=4, dissl=own)
    >>> method = DISSL(config, backbone, RunFacts(classes=10))
    >>> out = method([torch.randn(5, 3, 2, 2) for _ in range(3)])
    >>> tuple(out.projections.shape), tuple(out.predictions.shape), tuple(method.loss(out).shape)
    ((2, 5, 4), (3, 5, 6), ())
    """

    views_per_sample = 2
    multi_crop = True

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        check_prototypes("method.dissl.prototypes", config.dissl.prototypes, facts)
        width = feature_width(backbone)
        self.teacher = Projector(width, config.projector_hidden, config.projector_out)
        self.teacher_prototypes = nn.Linear(config.projector_out, config.dissl.prototypes, bias=False)
        self.student_prototypes = nn.Linear(width, config.dissl.prototypes, bias=False)
        self.assignment_temperature = config.dissl.assignment_temperature
        self.entropy_weight = config.dissl.entropy_weight
        self.invariance_weight = config.dissl.invariance_weight

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """V views, the first two of full size, or their features (V, N, F) -> the teacher's projections of
        those two (2, N, D).

        The student's predictions are the features (V, N, F): its only layer is `predicted_prototypes`.
        """
        features = encode(self.backbone, views, features)
        student = at_least_float32(features)
        projections = apply_head(self.teacher, features[: self.views_per_sample])
        return Outputs(
            features, projections, student, self.teacher_prototypes.weight, self.student_prototypes.weight
        )

    def loss(self, out: Outputs, aux: None = None) -> Tensor:
        """CE(p(x), q(x')) - λ H[mean p] + β CE(p(x), p(x')), averaged over pairs of different views (x of
        full size), in nats.

        p is the teacher's softmax, q the student's. Returns (): the cross-entropies of this rank's rows, the
        entropy of all ranks'."""
        assert (
            out.predictions is not None
            and out.prototypes is not None
            and out.predicted_prototypes is not None
        )
        return dissl_loss(
            out.predictions,
            out.predicted_prototypes,
            out.projections,
            out.prototypes,
            temperature=self.temperature,
            teacher_temperature=self.assignment_temperature,
            entropy_weight=self.entropy_weight,
            invariance_weight=self.invariance_weight,
            group=self.group,
        )

    def similarity(self, out: Outputs, aux: None = None) -> Sequence[Similarity]:
        """π of the task: the student's softmax over the classes, for every view."""
        assert out.predictions is not None and out.predicted_prototypes is not None
        return tuple(Similarity(view, out.predicted_prototypes, self.temperature) for view in out.predictions)

    def measures(self, out: Outputs, aux: None = None) -> dict[str, Tensor]:
        """maximality, determinism and invariance of the teacher's assignment p: `assignment_measures`."""
        assert out.prototypes is not None
        return assignment_measures(
            out.projections[0], out.projections[1], out.prototypes, self.assignment_temperature, self.group
        )
