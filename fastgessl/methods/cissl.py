"""CISSL: contrast a linear student with an MLP teacher; an image's own view is as much its positive as the
other one.

Dubois et al., "Improving Self-Supervised Learning by Characterizing Idealized Representations", NeurIPS 2022,
section 5.2.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.kernels import similarity_logsumexp
from fastgessl.methods.assignments import assignment_measures
from fastgessl.methods.base import Outputs, ProjectedMethod, RunFacts, Similarity, register
from fastgessl.models import Projector, apply_head, encode, feature_width


@register("cissl")
class CISSL(ProjectedMethod):
    """Two views, a linear student head and an MLP teacher head, both with a batch norm at the end. No
    stop-gradient, no state.

    A linear student, because the representation will be probed linearly; the view itself among its positives,
    because a probe must give all views of an image one answer.

    >>> import torch
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> method = CISSL(MethodConfig(name="cissl", projector_hidden=16, projector_out=4), backbone, RunFacts())
    >>> out = method([torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)])
    >>> tuple(out.projections.shape), tuple(out.predictions.shape)
    ((2, 5, 4), (2, 5, 4))
    >>> [tuple(pi.key.shape) for pi in method.similarity(out)]
    [(10, 4)]
    """

    views_per_sample = 2
    rings = True

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        width, outputs = feature_width(backbone), config.projector_out
        self.teacher = Projector(width, config.projector_hidden, outputs, output_norm=True)
        self.student = Projector(width, width, outputs, layers=1, output_norm=True)

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Two views (N, 3, S, S), or their features (2, N, F) -> the teacher's projections and the student's
        predictions (2, N, D).
        """
        features = encode(self.backbone, views, features)
        return Outputs(features, apply_head(self.teacher, features), apply_head(self.student, features))

    def loss(self, out: Outputs, aux: None = None) -> Tensor:
        """-(log q_self + log q_other) / 2, averaged over the 2N rows; q = softmax of a student row over the
        teacher rows of all ranks.

        Returns (), the mean over this rank's rows."""
        student, teacher = _unit_rows(out)
        lse = similarity_logsumexp(
            student, teacher, temperature=self.temperature, group=self.group, mode=self.exchange
        )
        both_views = (teacher + teacher.roll(len(teacher) // 2, dims=0)) / 2
        return (lse - (student * both_views).sum(1) / self.temperature).mean()

    def similarity(self, out: Outputs, aux: None = None) -> Sequence[Similarity]:
        """π of the task: the student's 2N rows over the teacher's."""
        student, teacher = _unit_rows(out)
        return (Similarity(student, teacher, self.temperature),)

    def measures(self, out: Outputs, aux: None = None) -> dict[str, Tensor]:
        """maximality, determinism and invariance of q over this rank's 2N rows: `assignment_measures`."""
        student, teacher = _unit_rows(out)
        first, second = student.chunk(2)
        return assignment_measures(first, second, teacher, self.temperature, None)


def _unit_rows(out: Outputs) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's unit rows, the first view's N before the second's: (2N, D) each."""
    assert out.predictions is not None
    student, teacher = (normalize(rows.flatten(0, 1), dim=1) for rows in (out.predictions, out.projections))
    return student, teacher
