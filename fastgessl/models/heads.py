"""From views to what a loss reads: views through the backbone, and the small networks behind it.

Heads are trained with the backbone and thrown away after it. A linear layer in front of a batch norm has no
bias: the norm would subtract it again.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from fastgessl.config import UsageError


def encode(backbone: nn.Module, views: Sequence[Tensor] | None, features: Tensor | None = None) -> Tensor:
    """V views, each (N, 3, S, S), -> features (V, N, F); or `features` themselves, where they are known
    already.

    Neighbouring views of one size share a forward of V·N rows and its batch norm. Raises ValueError if
    neither is given.

    >>> encode(torch.nn.Flatten(), [torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)]).shape
    torch.Size([2, 4, 12])
    """
    if features is not None:
        return features
    if not views:
        raise ValueError(
            "a method was given neither views nor features. Pass a list of views (N, 3, S, S), or their "
            "features (V, N, F)."
        )
    rows = [backbone(torch.cat(list(same))) for _, same in groupby(views, key=lambda view: view.shape)]
    return torch.cat(rows).unflatten(0, (len(views), -1))


def apply_head(head: nn.Module, rows: Tensor) -> Tensor:
    """A head on all views at once: (V, N, F) -> (V, N, D), at least float32: a KL under 1e-3 is noise in
    bfloat16.

    >>> apply_head(torch.nn.Linear(12, 5), torch.zeros(2, 4, 12)).shape
    torch.Size([2, 4, 5])
    """
    return at_least_float32(head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]))


def at_least_float32(rows: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are.

    >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def feature_width(backbone: nn.Module) -> int:
    """F of `encode`: the backbone's `num_features`. Raises UsageError if it has none."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise UsageError(
            f"the backbone {type(backbone).__name__} has no integer num_features. Set it to the width of "
            "the backbone's output."
        )
    return width


class Projector(nn.Sequential):
    """`layers` linear layers with batch norm and ReLU between them: (B, inputs) -> (B, outputs). One layer is
    a linear head.

    `output_norm` adds a batch norm after the last layer, as SimCLR does (Chen et al. 2020, official code);
    BYOL has none there (Grill et al. 2020, section 3.3).

    >>> import torch
    >>> Projector(16, 32, 8)(torch.randn(4, 16)).shape
    torch.Size([4, 8])
    >>> [type(layer).__name__ for layer in Projector(16, 32, 8, layers=1, output_norm=True)]
    ['Linear', 'BatchNorm1d']
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, layers: int = 2, output_norm: bool = False):
        modules: list[nn.Module] = []
        for layer in range(layers - 1):
            modules += [
                nn.Linear(hidden if layer else inputs, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
            ]
        modules.append(nn.Linear(hidden if layers > 1 else inputs, outputs, bias=not output_norm))
        super().__init__(*modules, *([nn.BatchNorm1d(outputs)] if output_norm else []))


class PlainProjector(nn.Sequential):
    """MoCo v2's projector: linear, ReLU, linear, no batch norm (Chen et al., arXiv 2003.04297). (B, inputs)
    -> (B, outputs).

    >>> import torch
    >>> PlainProjector(16, 32, 8)(torch.randn(4, 16)).shape
    torch.Size([4, 8])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


class MoCoV3Head(nn.Sequential):
    """MoCo v3's projector and predictor: (B, inputs) -> (B, outputs) through `layers` linear layers, none
    with a bias.

    Batch norm and ReLU stand between them; `output_norm` adds a batch norm without weights at the end (Chen,
    Xie and He, ICCV 2021, and its code).

    >>> import torch
    >>> out = MoCoV3Head(16, 32, 8, layers=3, output_norm=True)(torch.randn(64, 16))
    >>> out.var(0, correction=0).round(decimals=1).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, layers: int, output_norm: bool):
        modules: list[nn.Module] = []
        for layer in range(layers - 1):
            modules += [
                nn.Linear(hidden if layer else inputs, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
            ]
        modules.append(nn.Linear(hidden if layers > 1 else inputs, outputs, bias=False))
        super().__init__(*modules, *([nn.BatchNorm1d(outputs, affine=False)] if output_norm else []))


class BottleneckHead(nn.Sequential):
    """DINO's head below its last layer: three linear layers with GELU between them. (B, inputs) -> (B,
    outputs).

    `norm` puts a batch norm in front of each GELU. Weights start from a normal distribution of deviation
    0.02, cut off at 2, biases from 0 (Caron et al., ICCV 2021, and its code).

    >>> import torch
    >>> BottleneckHead(16, 32, 8)(torch.randn(4, 16)).shape
    torch.Size([4, 8])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, norm: bool = False):
        modules: list[nn.Module] = []
        for width in (inputs, hidden):
            modules += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.GELU()]
        super().__init__(*modules, nn.Linear(hidden, outputs))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
