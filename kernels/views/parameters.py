"""What is drawn for each view of a batch, and what its views share."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

Color = tuple[float, float, float]

NEUTRAL_FACTOR = (1.0, 1.0, 1.0, 0.0)
"""Brightness, contrast, saturation and hue that change nothing."""
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)
"""Of red, green and blue, as in torchvision."""


class Look(NamedTuple):
    """What all views of a batch share."""

    size: int
    """Pixels of a side."""
    mean: Color
    std: Color
    interpolation: str
    blur_kernel: int
    solarize_threshold: float
    """0 to 255."""
    resize: bool
    """Whether images are cropped, resized and flipped; else they are views already."""


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view of B images: CPU tensors of B rows."""

    crop: Tensor
    """(B, 4) float32: top, left, height, width of the area that becomes the view, pixels; fractions of a
    pixel are allowed."""
    reach: Tensor
    """(B, 4) float32: top, left, height, width of the area that interpolation may read, whole pixels. The
    crop itself in torchvision's resized crop; the whole image when an image is resized first and cropped
    afterwards."""
    flip: Tensor
    """(B,) bool: left-right flip."""
    jitter: Tensor
    """(B,) bool: colour jitter."""
    factors: Tensor
    """(B, 4) float32: brightness, contrast and saturation factors (1 changes nothing) and hue shift (turns; 0
    changes nothing)."""
    order: Tensor
    """(B, 4) int64: columns of `factors` in the order in which they are applied."""
    grayscale: Tensor
    """(B,) bool."""
    blur_sigma: Tensor
    """(B,) float32, pixels; 0 is no blur."""
    solarize: Tensor
    """(B,) bool."""

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows: slice | Tensor) -> "ViewParameters":
        return ViewParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def unchanged(cls, count: int, height: int, width: int) -> "ViewParameters":
        """Parameters that only resize: the whole image, no colour operation."""
        whole = torch.tensor([[0.0, 0.0, height, width]], dtype=torch.float32).repeat(count, 1)
        never = torch.zeros(count, dtype=torch.bool)
        return cls(
            crop=whole,
            reach=whole,
            flip=never,
            jitter=never,
            factors=torch.tensor([NEUTRAL_FACTOR], dtype=torch.float32).repeat(count, 1),
            order=torch.arange(4).repeat(count, 1),
            grayscale=never,
            blur_sigma=torch.zeros(count, dtype=torch.float32),
            solarize=never,
        )
