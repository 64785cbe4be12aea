"""Views of images in batch: crop, resize, flip, colour jitter, grayscale, blur, solarize, normalise.

What is drawn for an image is in `ViewParameters`; what is done with it follows torchvision's transforms
on float tensors, in the order of the published recipes. Crop + resize + flip, and the blur, are linear along
each axis: two small matrices a sample, so a batch of them is four batched matrix products.
`views.reference` holds the definition, one image at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastgessl.kernels.backend import implementation_for
from fastgessl.kernels.views.parameters import LUMA_WEIGHTS, NEUTRAL_FACTOR, Color, Look, ViewParameters

# Pixels worked on at once on a CPU, so that the float planes of a step stay in the second-level cache.
CPU_CHUNK_PIXELS = 1 << 17


def augment_views(
    images: Tensor,
    parameters: ViewParameters,
    *,
    size: int,
    mean: Color,
    std: Color,
    interpolation: str = "bilinear",
    blur_kernel: int = 23,
    solarize_threshold: float = 128.0,
    implementation: str | None = None,
) -> Tensor:
    """One view of every image, as torchvision's v2 transforms make it from float tensors with the same
    parameters.

    Crop, resize (antialiased, `interpolation` "bilinear" or "bicubic"; bicubic overshoot is clipped) and
    flip; brightness, contrast about the image's own mean luma, saturation and HSV hue in each sample's own
    order, clipped to [0, 1] after each; grayscale; Gaussian blur of `blur_kernel` taps with reflected
    borders; solarize at `solarize_threshold` (0 to 255); (x - mean) / std.

    images: (B, H, W, 3) uint8 on any device. Returns (B, 3, size, size) float32, channels_last, on the same
    device. A CUDA device that can run them takes the Triton kernels, everything else batched PyTorch;
    `implementation` "triton" or "chunked" says otherwise. Raises ValueError if shapes or dtypes do not fit,
    for a crop or reach outside the image, and for a blur kernel that is even or does not fit a view of this
    size.

    >>> images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    >>> views = augment_views(images, ViewParameters.unchanged(2, 8, 8), size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> views.shape, views.min().item(), views.max().item()
    (torch.Size([2, 3, 16, 16]), -2.0, -2.0)
    """
    look = Look(size, mean, std, interpolation, blur_kernel, solarize_threshold, resize=True)
    return _views(images, parameters, look, implementation)


def color_views(
    images: Tensor,
    parameters: ViewParameters,
    *,
    mean: Color,
    std: Color,
    blur_kernel: int = 23,
    solarize_threshold: float = 128.0,
    implementation: str | None = None,
) -> Tensor:
    """The part of `augment_views` after the flip, for images that are cropped, resized and flipped already.

    images: (B, S, S, 3) uint8; crop, reach and flip are not read. Returns (B, 3, S, S) float32,
    channels_last, on the same device. Raises ValueError as `augment_views`.

    >>> images = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    >>> color_views(images, ViewParameters.unchanged(1, 4, 4), mean=(0, 0, 0), std=(1, 1, 1), blur_kernel=3).unique()
    tensor([1.])
    """
    size = images.shape[1] if images.dim() == 4 else 0
    look = Look(size, mean, std, "bilinear", blur_kernel, solarize_threshold, resize=False)
    return _views(images, parameters, look, implementation)


def _views(images: Tensor, parameters: ViewParameters, look: Look, implementation: str | None) -> Tensor:
    _check(images, parameters, look, implementation)
    if look.resize:
        _check_crop(parameters, *images.shape[1:3])
    if implementation_for(images, implementation)[0] == "triton":
        from fastgessl.kernels.views.triton import augment

        return augment(images, parameters, look)
    shape = (len(images), 3, look.size, look.size)
    out = torch.empty(shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last)
    with _exact(images.device):
        for rows in _chunks(images, max(look.size**2, images.shape[1] * images.shape[2])):
            whole = rows.stop - rows.start == len(images)
            drawn = parameters if whole else parameters[rows]
            if look.resize:
                pixels = _crop_resize_flip(images[rows], drawn, look)
            else:
                pixels = (
                    images[rows].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
                )
                pixels.mul_(1 / 255)
            _color(pixels, drawn, look)
            scale = 1 / pixels.new_tensor(look.std)[:, None, None]
            shift = -pixels.new_tensor(look.mean)[:, None, None] * scale
            torch.addcmul(shift, pixels, scale, out=out[rows])
    return out


def _check(images: Tensor, parameters: ViewParameters, look: Look, implementation: str | None) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images must be (B, H, W, 3) uint8, found {tuple(images.shape)} {images.dtype}. Convert them "
            "first."
        )
    if not look.resize and images.shape[1] != images.shape[2]:
        raise ValueError(
            f"images must be square views (B, S, S, 3), found {tuple(images.shape)}. Crop and resize them "
            "first."
        )
    if implementation == "reference":
        raise ValueError(
            "views have no implementation='reference' in batch. Choose chunked or triton, or call "
            "views.reference yourself."
        )
    if len(parameters.flip) != len(images):
        raise ValueError(
            f"parameters describe {len(parameters)} images, but {len(images)} were given. Draw one row an "
            "image."
        )
    unknown = (parameters.order < 0) | (parameters.order >= len(NEUTRAL_FACTOR))
    if unknown.any():
        raise ValueError(
            f"order must hold columns of factors, 0 to 3, found {int(parameters.order[unknown][0])}."
        )
    if look.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', found {look.interpolation!r}.")
    if bool((parameters.blur_sigma > 0).any()) and (
        look.blur_kernel % 2 == 0 or look.blur_kernel // 2 >= look.size
    ):
        raise ValueError(
            f"blur_kernel must be odd and at most {2 * look.size - 1} for views of {look.size} pixels, found "
            f"{look.blur_kernel}."
        )


def _check_crop(parameters: ViewParameters, height: int, width: int) -> None:
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


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast (its matrix products have 8 bits of mantissa), and one thread on a CPU."""
    threads = torch.get_num_threads()
    try:
        # Operations on a chunk last some 20 µs: a second OpenMP thread gains a quarter on an idle machine,
        # and where decoders or other processes want the cores its spinning costs 10 times the work (170
        # against 12 ms for 2 x 256 views of 16 pixels on two cores).
        if device.type == "cpu":
            torch.set_num_threads(1)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)


def _chunks(images: Tensor, pixels: int) -> list[slice]:
    count = len(images)
    step = count if images.device.type != "cpu" else max(1, CPU_CHUNK_PIXELS // pixels)
    return [slice(start, min(start + step, count)) for start in range(0, count, max(step, 1))]


def _crop_resize_flip(images: Tensor, drawn: ViewParameters, look: Look) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, size, size) float32 in [0, 1], contiguous."""
    size, (count, height, width, _) = look.size, images.shape
    crop, reach, flip = (part.to(images.device) for part in (drawn.crop, drawn.reach, drawn.flip))
    never = torch.zeros_like(flip)
    rows = _resize_matrix(crop[:, 0::2], reach[:, 0::2], never, look, height)
    columns = _resize_matrix(crop[:, 1::2], reach[:, 1::2], flip, look, width)
    narrowed = torch.bmm(rows, images.reshape(count, height, width * 3).to(torch.float32))
    planes = narrowed.view(count, size, width, 3).permute(0, 3, 1, 2).reshape(count, 3 * size, width)
    return torch.bmm(planes, columns.mT).view(count, 3, size, size).mul_(1 / 255).clamp_(0, 1)


def _resize_matrix(crop: Tensor, reach: Tensor, flip: Tensor, look: Look, extent: int) -> Tensor:
    """(B, size, extent): row i weighs the pixels of one axis that make output pixel i. The filter widens with
    the reduction (antialias).

    `crop` and `reach` are that axis's starts and lengths, (B, 2).
    """
    size, (start, length), (reach_start, reach_length) = look.size, crop.unbind(1), reach.unbind(1)
    scale = (length / size)[:, None, None]
    position = torch.arange(size, dtype=start.dtype, device=start.device).expand(len(start), size)
    position = torch.where(flip[:, None], size - 1 - position, position)[:, :, None]
    center = start[:, None, None] + scale * (position + 0.5)
    tap = torch.arange(extent, dtype=start.dtype, device=start.device) + 0.5
    distance = ((tap - center) / scale.clamp(min=1)).abs()
    if look.interpolation == "bilinear":
        weight = (1 - distance).clamp_(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    readable = (tap > reach_start[:, None]) & (tap < (reach_start + reach_length)[:, None])
    weight = weight * readable[:, None, :]
    return weight / weight.sum(dim=2, keepdim=True)


def _color(pixels: Tensor, drawn: ViewParameters, look: Look) -> None:
    """Jitter, grayscale, blur and solarize (B, 3, S, S) in place; each operation touches the samples that
    were chosen for it.
    """
    for position in range(4):
        for operation, adjust in enumerate((_brightness, _contrast, _saturation, _hue)):
            factor = drawn.factors[:, operation]
            chosen = (
                drawn.jitter & (drawn.order[:, position] == operation) & (factor != NEUTRAL_FACTOR[operation])
            )
            _replace(pixels, chosen, adjust, factor)
    _replace(pixels, drawn.grayscale, lambda images, _: _luma(images).expand_as(images), drawn.factors[:, 0])
    _replace(
        pixels,
        drawn.blur_sigma > 0,
        lambda images, sigma: _blur(images, sigma, look.blur_kernel),
        drawn.blur_sigma,
    )
    _replace(
        pixels,
        drawn.solarize,
        lambda images, _: torch.where(images >= look.solarize_threshold / 255, 1 - images, images),
        drawn.factors[:, 0],
    )


def _replace(
    pixels: Tensor, chosen: Tensor, adjust: Callable[[Tensor, Tensor], Tensor], factor: Tensor
) -> None:
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return
    strength = factor[rows].to(pixels.device)[:, None, None, None]
    if len(rows) == len(pixels):
        pixels.copy_(adjust(pixels, strength))
    else:
        rows = rows.to(pixels.device)
        pixels.index_copy_(0, rows, adjust(pixels.index_select(0, rows), strength))


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(images).mean(dim=(2, 3), keepdim=True)
    return (images * factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_((1 - factor) * _luma(images)).clamp_(0, 1)


def _hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV: each channel is max - chroma * clip(min(k, 4 - k), 0, 1), k its distance from
    the hue in sextants.
    """
    red, green, blue = images.unbind(1)
    highest = images.amax(1)
    chroma = highest - images.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sextant = torch.where(
        highest == red,
        (green - blue) / divisor,
        torch.where(highest == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sextant = sextant.add_(6 * turns[:, 0])
    channel = images.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (sextant[:, None] + channel).remainder_(6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(highest[:, None], chroma[:, None], k, value=-1)


def _luma(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 1, S, S)"""
    red, green, blue = LUMA_WEIGHTS
    return (images[:, :1] * red).add_(images[:, 1:2], alpha=green).add_(images[:, 2:], alpha=blue)


def _blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian of `kernel` taps along both axes, borders reflected. One (S, S) matrix a sample serves both
    axes.
    """
    count, _, size, _ = images.shape
    matrix = _blur_matrix(sigma.view(count), kernel, size).mT
    rows = torch.bmm(images.reshape(count, 3 * size, size), matrix).view_as(images).mT
    return torch.bmm(rows.reshape(count, 3 * size, size), matrix).view_as(images).mT


def _blur_matrix(sigma: Tensor, kernel: int, size: int) -> Tensor:
    """(B,) -> (B, size, size): row i weighs the pixels of one axis that make blurred pixel i."""
    offset = torch.arange(kernel, device=sigma.device) - kernel // 2
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)
    source = torch.arange(size, device=sigma.device)[:, None] + offset
    source = (size - 1) - ((size - 1) - source.abs()).abs()
    matrix = sigma.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), size, kernel), weight[:, None].expand(len(sigma), size, kernel)
    )
