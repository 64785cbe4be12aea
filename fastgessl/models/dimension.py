"""A wider representation at few parameters: through a bottleneck of channels in front of the pooling.

Dubois et al., "Improving Self-Supervised Learning by Characterizing Idealized Representations", NeurIPS 2022,
section 5.1: more dimensions let a linear probe tell more labelings apart.
"""

from typing import Any

from torch import Tensor, nn


class Widening(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm: (B, inputs, h, w) -> (B, outputs, h, w), not negative.

    Where outputs are a multiple of inputs, the input is repeated and added, as a residual block does.

    >>> import torch
    >>> Widening(16, 8, 64)(torch.randn(2, 16, 4, 4)).shape
    torch.Size([2, 64, 4, 4])
    """

    def __init__(self, inputs: int, bottleneck: int, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(
            *convolution(inputs, bottleneck, 1),
            nn.ReLU(inplace=True),
            *convolution(bottleneck, bottleneck, 3),
            nn.ReLU(inplace=True),
            *convolution(bottleneck, outputs, 1),
        )
        self.repeats = outputs // inputs if outputs % inputs == 0 else 0

    def forward(self, maps: Tensor) -> Tensor:
        wide = self.layers(maps)
        return (wide + maps.repeat(1, self.repeats, 1, 1) if self.repeats else wide).relu()


def widen(backbone: Any, bottleneck: int, outputs: int) -> None:
    """Append a `Widening` to the last stage of a timm ResNet, whose output then has `outputs` channels."""
    backbone.layer4.append(Widening(backbone.num_features, bottleneck, outputs))
    backbone.num_features = backbone.head_hidden_size = outputs


def convolution(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    """A bias-free convolution of the same size, and its batch norm. Exported encoders carry the source of
    this and of `Widening`.
    """
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer, nn.BatchNorm2d(outputs)
