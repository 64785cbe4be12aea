"""The small networks between representation and loss. Both are trained with the backbone and thrown away after it.

A linear layer in front of a batch norm has no bias: the norm would subtract it again.
"""

from __future__ import annotations

from torch import nn


class Projector(nn.Sequential):
    """Linear, batch norm, ReLU, linear: (B, inputs) -> (B, outputs).

    `output_norm` adds a batch norm after the last layer, as SimCLR does (Chen et al. 2020, official code); BYOL has none there
    (Grill et al. 2020, section 3.3).

    >>> import torch
    >>> Projector(16, 32, 8)(torch.randn(4, 16)).shape
    torch.Size([4, 8])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, output_norm: bool = False):
        layers: list[nn.Module] = [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(hidden, outputs, bias=not output_norm))
        super().__init__(*layers, *([nn.BatchNorm1d(outputs)] if output_norm else []))


class Predictor(Projector):
    """BYOL's predictor: the projector's architecture from projections to projections, (B, width) -> (B, width).

    >>> import torch
    >>> Predictor(8, 32)(torch.randn(4, 8)).shape
    torch.Size([4, 8])
    """

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden, width)
