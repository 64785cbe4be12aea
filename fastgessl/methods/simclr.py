"""SimCLR: recognise an image's other view among all others.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, eq. (1).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.kernels import nt_xent
from fastgessl.methods.base import Outputs, ProjectedMethod, RunFacts, Similarity, register
from fastgessl.models import Projector, feature_width


@register("simclr")
class SimCLR(ProjectedMethod):
    """Two views, one projector, NT-Xent. Keeps no state.

    >>> import torch
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    >>> backbone.num_features = 6
    >>> method = SimCLR(MethodConfig(projector_hidden=16, projector_out=4), backbone, RunFacts())
    >>> out = method([torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)])
    >>> tuple(out.projections.shape), tuple(method.loss(out).shape)
    ((2, 5, 4), ())
    """

    views_per_sample = 2
    rings = True

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__(config, backbone, facts)
        self.projector = Projector(
            feature_width(backbone), config.projector_hidden, config.projector_out, output_norm=True
        )

    def loss(self, out: Outputs, aux: None = None) -> Tensor:
        """NT-Xent over the 2N rows of both views; `out.projections` is (2, N, D). Returns (), the mean over
        this rank's rows.
        """
        first, second = out.projections
        return nt_xent(first, second, temperature=self.temperature, group=self.group, mode=self.exchange)

    def similarity(self, out: Outputs, aux: None = None) -> Sequence[Similarity]:
        """π of the task: rows whose softmax over the other view's embeddings says which image this is, in
        both directions.
        """
        first, second = normalize(out.projections, dim=-1)
        return Similarity(first, second, self.temperature), Similarity(second, first, self.temperature)
