"""What is drawn for the views of a batch, and whether it fits the images."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

NEUTRAL_FACTOR = (1.0, 1.0, 1.0, 0.0)


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

    def __getitem__(self, rows: slice | Tensor) -> ViewParameters:
        return ViewParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def unchanged(cls, count: int, height: int, width: int) -> ViewParameters:
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


def check_crop(parameters: ViewParameters, height: int, width: int) -> None:
    """Refuse what would read beside the image (a reach outside of it), or find no pixel to read (a crop
    outside of its reach).
    """
    extent, start, length = (
        parameters.crop.new_tensor([height, width]),
        parameters.reach[:, :2],
        parameters.reach[:, 2:],
    )
    inside = (start >= 0) & (length >= 1) & (start + length <= extent)
    crop, end = parameters.crop[:, :2], parameters.crop[:, :2] + parameters.crop[:, 2:]
    # Half a pixel of room, for crops that were computed in fractions: the middle of an output pixel stays
    # within a pixel of the reach.
    readable = (parameters.crop[:, 2:] > 0) & (crop >= start - 0.5) & (end <= start + length + 0.5)
    fits = (inside & readable).all(1)
    if not fits.all():
        row = int((~fits).nonzero()[0, 0])
        raise ValueError(
            f"the reach of a view must lie in its image, {height} x {width}, and the crop in the reach; "
            f"found for image {row} "
            f"crop {parameters.crop[row].tolist()} and reach {parameters.reach[row].tolist()} (top, left, "
            "height, width). "
            "Clip the one or pad the image."
        )
