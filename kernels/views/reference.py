"""What `augment_views` must equal, one image and one operation at a time.

The operations are those of torchvision's transforms on float images: crop and antialiased resize (the filter
widens with the reduction, as in Pillow), ColorJitter, grayscale, GaussianBlur, solarize, Normalize.
"""

import colorsys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastgessl.kernels.views.parameters import LUMA_WEIGHTS, Color, ViewParameters


def augment_view_reference(
    image: Tensor,
    drawn: ViewParameters,
    *,
    size: int,
    mean: Color,
    std: Color,
    interpolation: str = "bilinear",
    blur_kernel: int = 23,
    solarize_threshold: float = 128.0,
) -> Tensor:
    """One image (H, W, 3) uint8 and a draw of one row -> (3, size, size) float64. Slow: loops over the output
    pixels of an axis.

    >>> image = torch.full((4, 6, 3), 51, dtype=torch.uint8)
    >>> view = augment_view_reference(image, ViewParameters.unchanged(1, 4, 6), size=2, mean=(0, 0, 0), std=(1, 1, 1))
    >>> [round(value, 6) for value in view.unique().tolist()]
    [0.2]
    """
    pixels = image.permute(2, 0, 1).double() / 255
    crop, reach = drawn.crop[0].tolist(), drawn.reach[0].tolist()
    pixels = resize_axis(pixels.mT, crop[0::2], reach[0::2], size, interpolation).mT
    pixels = resize_axis(pixels, crop[1::2], reach[1::2], size, interpolation).clamp(0, 1)
    if drawn.flip[0]:
        pixels = pixels.flip(2)
    if drawn.jitter[0]:
        for operation in drawn.order[0].tolist():
            adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)[operation]
            pixels = adjust(pixels, drawn.factors[0, operation].item())
    if drawn.grayscale[0]:
        pixels = luma(pixels).expand(3, size, size)
    if drawn.blur_sigma[0] > 0:
        pixels = gaussian_blur(pixels, drawn.blur_sigma[0].item(), blur_kernel)
    if drawn.solarize[0]:
        pixels = torch.where(pixels >= solarize_threshold / 255, 1 - pixels, pixels)
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def resize_axis(
    pixels: Tensor, crop: Sequence[float], reach: Sequence[float], size: int, interpolation: str
) -> Tensor:
    """(..., W) -> (..., size): the pixels of the crop (its start and length), filtered from those within the reach."""
    (start, length), (reach_start, reach_length) = crop, reach
    scale = length / size
    taps = torch.arange(int(reach_start), int(reach_start + reach_length))
    columns = []
    for position in range(size):
        center = start + scale * (position + 0.5)
        weight = filter_weight((taps + 0.5 - center) / max(scale, 1.0), interpolation)
        columns.append((pixels[..., taps] * weight).sum(-1) / weight.sum())
    return torch.stack(columns, dim=-1)


def filter_weight(distance: Tensor, interpolation: str) -> Tensor:
    """The triangle (bilinear), or Keys' cubic with a = -1/2 (bicubic), at `distance` from its center."""
    x = distance.double().abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def luma(pixels: Tensor) -> Tensor:
    """(3, S, S) -> (1, S, S)"""
    return (pixels * pixels.new_tensor(LUMA_WEIGHTS)[:, None, None]).sum(0, keepdim=True)


def adjust_brightness(pixels: Tensor, factor: float) -> Tensor:
    return (factor * pixels).clamp(0, 1)


def adjust_contrast(pixels: Tensor, factor: float) -> Tensor:
    return (factor * pixels + (1 - factor) * luma(pixels).mean()).clamp(0, 1)


def adjust_saturation(pixels: Tensor, factor: float) -> Tensor:
    return (factor * pixels + (1 - factor) * luma(pixels)).clamp(0, 1)


def adjust_hue(pixels: Tensor, turns: float) -> Tensor:
    """Python's own HSV, pixel by pixel."""
    shifted = []
    for red, green, blue in pixels.flatten(1).T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        shifted.append(colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value))
    return pixels.new_tensor(shifted).T.view_as(pixels)


def gaussian_blur(pixels: Tensor, sigma: float, kernel: int) -> Tensor:
    """Correlation with a (kernel, kernel) Gaussian, borders reflected."""
    offset = torch.arange(kernel, dtype=pixels.dtype) - kernel // 2
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    weight = weight / weight.sum()
    padded = functional.pad(pixels[None], [kernel // 2] * 4, mode="reflect")
    return functional.conv2d(padded, (weight[:, None] * weight).expand(3, 1, kernel, kernel), groups=3)[0]
