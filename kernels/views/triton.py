"""Views in Triton: what `views.torch` does with PyTorch, in one pass over a small view and three over a large
one.

A view of up to WHOLE_PIXELS stays in one program's registers from the crop to the normalisation, the mean for
its contrast included. A larger one takes a pass that crops, resizes, flips and sums the brightness that
contrast needs, and a pass for the colors. Blur is two further passes, over the samples that were chosen for
it and no others. Parameters come as one row of floats a sample. Nothing is added atomically, so that results
are deterministic.
"""

import math
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgessl.kernels.collectives import to_device
from fastgessl.kernels.views.parameters import LUMA_WEIGHTS, NEUTRAL_FACTOR, Look, ViewParameters

WHOLE_PIXELS = 4096
BLOCK_PIXELS = 1024
# With 128 or more a warp, views of 16 and 32 pixels and the bicubic crop spill 8 or 16 bytes, on sm_80 or
# sm_90, under Triton 3.6 or 3.9.
PIXELS_PER_WARP = 64

# Columns of a sample's row of parameters.
CROP, REACH, FLIP, JITTER, FACTORS, ORDER, GRAYSCALE, SIGMA, SOLARIZE, COLUMNS = (
    tl.constexpr(column) for column in (0, 4, 8, 9, 10, 14, 18, 19, 20, 21)
)
RED, GREEN, BLUE = (tl.constexpr(weight) for weight in LUMA_WEIGHTS)
NO_FACTOR, NO_TURN = tl.constexpr(NEUTRAL_FACTOR[0]), tl.constexpr(NEUTRAL_FACTOR[3])
# exp(-x²/2) is exp2 of x² times this.
GAUSSIAN = tl.constexpr(-0.5 * math.log2(math.e))


@triton.jit
def _filter_weight(b_distance, BICUBIC: tl.constexpr):
    """The triangle, or Keys' cubic with a = -1/2, at a distance from its center."""
    if BICUBIC:
        b_near = (1.5 * b_distance - 2.5) * b_distance * b_distance + 1
        b_far = ((2.5 - 0.5 * b_distance) * b_distance - 4) * b_distance + 2
        b_weight = tl.where(b_distance < 1, b_near, tl.where(b_distance < 2, b_far, 0.0))
    else:
        b_weight = tl.maximum(1 - b_distance, 0.0)
    return b_weight


@triton.jit
def _tap(b_first, i_tap, b_center, spread, reach_start, reach_length, BICUBIC: tl.constexpr):
    """Pixel number and weight of tap `i_tap` along one axis; the weight is 0 beyond the reach."""
    b_tap = b_first + i_tap
    b_weight = _filter_weight(tl.abs(b_tap + 0.5 - b_center) / spread, BICUBIC)
    m_reach = (b_tap >= reach_start) & (b_tap < reach_start + reach_length)
    return b_tap, tl.where(m_reach, b_weight, 0.0)


@triton.jit
def _resized(p_image, p_row, b_y, b_x, m_pixel, H, W, S, BICUBIC: tl.constexpr):
    """Output pixels (y, x) of the crop, antialiased and flipped: three channels in [0, 1]."""
    scale_y, scale_x = tl.load(p_row + CROP + 2) / S, tl.load(p_row + CROP + 3) / S
    spread_y, spread_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    support: tl.constexpr = 2.0 if BICUBIC else 1.0
    reach_top, reach_left = tl.load(p_row + REACH), tl.load(p_row + REACH + 1)
    reach_height, reach_width = tl.load(p_row + REACH + 2), tl.load(p_row + REACH + 3)
    b_x = tl.where(tl.load(p_row + FLIP) > 0, S - 1 - b_x, b_x)
    b_center_y = tl.load(p_row + CROP) + scale_y * (b_y.to(tl.float32) + 0.5)
    b_center_x = tl.load(p_row + CROP + 1) + scale_x * (b_x.to(tl.float32) + 0.5)
    b_first_y, b_first_x = (
        tl.floor(b_center_y - support * spread_y),
        tl.floor(b_center_x - support * spread_x),
    )
    taps_y, taps_x = (2 * support * spread_y).to(tl.int32) + 2, (2 * support * spread_x).to(tl.int32) + 2
    b_red, b_green, b_blue, b_total = b_center_y * 0, b_center_y * 0, b_center_y * 0, b_center_y * 0
    for i_y in range(0, taps_y):
        b_tap_y, b_weight_y = _tap(b_first_y, i_y, b_center_y, spread_y, reach_top, reach_height, BICUBIC)
        for i_x in range(0, taps_x):
            b_tap_x, b_weight_x = _tap(b_first_x, i_x, b_center_x, spread_x, reach_left, reach_width, BICUBIC)
            b_weight = b_weight_y * b_weight_x
            m_tap = m_pixel & (b_weight != 0)
            p_pixel = p_image + (b_tap_y.to(tl.int32) * W + b_tap_x.to(tl.int32)) * 3
            b_red += b_weight * tl.load(p_pixel, mask=m_tap, other=0).to(tl.float32)
            b_green += b_weight * tl.load(p_pixel + 1, mask=m_tap, other=0).to(tl.float32)
            b_blue += b_weight * tl.load(p_pixel + 2, mask=m_tap, other=0).to(tl.float32)
            b_total += b_weight
    b_total = tl.where(m_pixel, b_total, 1.0) * 255.0
    return _clipped(b_red / b_total), _clipped(b_green / b_total), _clipped(b_blue / b_total)


@triton.jit
def _clipped(b_value):
    return tl.minimum(tl.maximum(b_value, 0.0), 1.0)


@triton.jit
def _luma(b_red, b_green, b_blue):
    return RED * b_red + GREEN * b_green + BLUE * b_blue


@triton.jit
def _hue_channel(b_sextant, b_highest, b_chroma, NUMBER: tl.constexpr):
    """highest - chroma * clip(min(k, 4 - k), 0, 1), k = (number + sextant) mod 6."""
    b_k = b_sextant + NUMBER
    b_k = b_k - 6 * tl.floor(b_k / 6)
    return b_highest - b_chroma * _clipped(tl.minimum(b_k, 4 - b_k))


@triton.jit
def _hue(b_red, b_green, b_blue, turns):
    """Rotate the hue of HSV."""
    b_highest = tl.maximum(tl.maximum(b_red, b_green), b_blue)
    b_chroma = b_highest - tl.minimum(tl.minimum(b_red, b_green), b_blue)
    b_divisor = tl.where(b_chroma == 0, 1.0, b_chroma)
    b_of_green, b_of_blue = (b_blue - b_red) / b_divisor + 2, (b_red - b_green) / b_divisor + 4
    b_sextant = tl.where(
        b_highest == b_red,
        (b_green - b_blue) / b_divisor,
        tl.where(b_highest == b_green, b_of_green, b_of_blue),
    )
    b_sextant += 6 * turns
    return (
        _hue_channel(b_sextant, b_highest, b_chroma, 5),
        _hue_channel(b_sextant, b_highest, b_chroma, 3),
        _hue_channel(b_sextant, b_highest, b_chroma, 1),
    )


@triton.jit
def _jittered(
    b_red, b_green, b_blue, p_row, mean, m_pixel, pixels, UNTIL_CONTRAST: tl.constexpr, OWN_MEAN: tl.constexpr
):
    """Brightness, contrast, saturation and hue in the sample's own order; only those before contrast with
    UNTIL_CONTRAST.

    OWN_MEAN: contrast's mean is that of these pixels, as they are when its turn comes; else it is `mean`.
    """
    going = tl.load(p_row + JITTER) > 0
    for position in tl.static_range(4):
        operation = tl.load(p_row + ORDER + position).to(tl.int32)
        factor = tl.load(p_row + FACTORS + operation)
        if UNTIL_CONTRAST:
            going = going & (operation != 1)
        if going & (operation == 0) & (factor != NO_FACTOR):
            b_red, b_green, b_blue = (
                _clipped(b_red * factor),
                _clipped(b_green * factor),
                _clipped(b_blue * factor),
            )
        if going & (operation == 1) & (factor != NO_FACTOR):
            center = (
                tl.sum(tl.where(m_pixel, _luma(b_red, b_green, b_blue), 0.0)) / pixels if OWN_MEAN else mean
            )
            shift = (1 - factor) * center
            b_red, b_green, b_blue = (
                _clipped(b_red * factor + shift),
                _clipped(b_green * factor + shift),
                _clipped(b_blue * factor + shift),
            )
        if going & (operation == 2) & (factor != NO_FACTOR):
            b_shift = (1 - factor) * _luma(b_red, b_green, b_blue)
            b_red, b_green = _clipped(b_red * factor + b_shift), _clipped(b_green * factor + b_shift)
            b_blue = _clipped(b_blue * factor + b_shift)
        if going & (operation == 3) & (factor != NO_TURN):
            b_red, b_green, b_blue = _hue(b_red, b_green, b_blue, factor)
    return b_red, b_green, b_blue


@triton.jit
def _finished(b_value, p_row, threshold, mean, inverse_std):
    """Solarize and normalise one channel; no value reaches the threshold of a sample that is not solarized."""
    b_value = tl.where(
        b_value >= tl.where(tl.load(p_row + SOLARIZE) > 0, threshold, 2.0), 1 - b_value, b_value
    )
    return (b_value - mean) * inverse_std


@triton.jit
def _store(p_out, b_red, b_green, b_blue, p_row, p_colors, threshold, m_pixel, FINISH: tl.constexpr):
    """Write three channels; with FINISH, solarized and normalised unless the sample waits for its blur."""
    if FINISH and tl.load(p_row + SIGMA) == 0:
        b_red = _finished(b_red, p_row, threshold, tl.load(p_colors), tl.load(p_colors + 3))
        b_green = _finished(b_green, p_row, threshold, tl.load(p_colors + 1), tl.load(p_colors + 4))
        b_blue = _finished(b_blue, p_row, threshold, tl.load(p_colors + 2), tl.load(p_colors + 5))
    tl.store(p_out, b_red, mask=m_pixel)
    tl.store(p_out + 1, b_green, mask=m_pixel)
    tl.store(p_out + 2, b_blue, mask=m_pixel)


@triton.jit
def _grey(b_red, b_green, b_blue, p_row):
    if tl.load(p_row + GRAYSCALE) > 0:
        b_luma = _luma(b_red, b_green, b_blue)
        b_red, b_green, b_blue = b_luma, b_luma, b_luma
    return b_red, b_green, b_blue


@triton.jit
def _read(p_pixel, m_pixel, BYTES: tl.constexpr):
    """Three channels in [0, 1] of bytes or floats."""
    b_red, b_green = (
        tl.load(p_pixel, mask=m_pixel, other=0).to(tl.float32),
        tl.load(p_pixel + 1, mask=m_pixel, other=0).to(tl.float32),
    )
    b_blue = tl.load(p_pixel + 2, mask=m_pixel, other=0).to(tl.float32)
    if BYTES:
        b_red, b_green, b_blue = b_red * (1 / 255), b_green * (1 / 255), b_blue * (1 / 255)
    return b_red, b_green, b_blue


@triton.jit
def whole_view_kernel(
    p_images,
    p_rows,
    p_colors,
    p_out,
    H,
    W,
    S,
    threshold,
    RESIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sample: crop to normalisation, all but the blur.  Work: taps² loads a pixel, one store."""
    i_sample = tl.program_id(0).to(tl.int64)
    p_row = p_rows + i_sample * COLUMNS
    o_pixel = tl.arange(0, BLOCK)
    m_pixel = o_pixel < S * S
    if RESIZE:
        b_red, b_green, b_blue = _resized(
            p_images + i_sample * H * W * 3, p_row, o_pixel // S, o_pixel % S, m_pixel, H, W, S, BICUBIC
        )
    else:
        b_red, b_green, b_blue = _read(p_images + i_sample * S * S * 3 + o_pixel * 3, m_pixel, True)
    b_red, b_green, b_blue = _jittered(b_red, b_green, b_blue, p_row, 0.0, m_pixel, S * S, False, True)
    b_red, b_green, b_blue = _grey(b_red, b_green, b_blue, p_row)
    _store(
        p_out + i_sample * S * S * 3 + o_pixel * 3,
        b_red,
        b_green,
        b_blue,
        p_row,
        p_colors,
        threshold,
        m_pixel,
        True,
    )


@triton.jit
def crop_kernel(
    p_images,
    p_rows,
    p_colors,
    p_out,
    p_sums,
    H,
    W,
    S,
    threshold,
    RESIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a large view: crop, resize and flip to floats, and the sum of the luma that contrast will
    see, (B, blocks).
    """
    i_sample, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_rows + i_sample * COLUMNS
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < S * S
    if RESIZE:
        b_red, b_green, b_blue = _resized(
            p_images + i_sample * H * W * 3, p_row, o_pixel // S, o_pixel % S, m_pixel, H, W, S, BICUBIC
        )
        _store(
            p_out + i_sample * S * S * 3 + o_pixel * 3,
            b_red,
            b_green,
            b_blue,
            p_row,
            p_colors,
            threshold,
            m_pixel,
            False,
        )
    else:
        b_red, b_green, b_blue = _read(p_images + i_sample * S * S * 3 + o_pixel * 3, m_pixel, True)
    b_red, b_green, b_blue = _jittered(b_red, b_green, b_blue, p_row, 0.0, m_pixel, S * S, True, False)
    tl.store(
        p_sums + i_sample * tl.num_programs(1) + i_block,
        tl.sum(tl.where(m_pixel, _luma(b_red, b_green, b_blue), 0.0)),
    )


@triton.jit
def color_kernel(
    p_images,
    p_rows,
    p_colors,
    p_out,
    p_sums,
    S,
    threshold,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A block of a large view: jitter, grayscale, and what follows unless blur comes first.  Reads bytes, or
    the crop's floats.
    """
    i_sample, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_rows + i_sample * COLUMNS
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < S * S
    o_sum = tl.arange(0, BLOCKS)
    blocks = tl.num_programs(1)
    mean = tl.sum(tl.load(p_sums + i_sample * blocks + o_sum, mask=o_sum < blocks, other=0.0)) / (S * S)
    o_first = i_sample * S * S * 3 + o_pixel * 3
    b_red, b_green, b_blue = _read((p_images if BYTES else p_out) + o_first, m_pixel, BYTES)
    b_red, b_green, b_blue = _jittered(b_red, b_green, b_blue, p_row, mean, m_pixel, S * S, False, False)
    b_red, b_green, b_blue = _grey(b_red, b_green, b_blue, p_row)
    _store(p_out + o_first, b_red, b_green, b_blue, p_row, p_colors, threshold, m_pixel, True)


@triton.jit
def blur_kernel(
    p_in,
    p_chosen,
    p_rows,
    p_colors,
    p_out,
    S,
    threshold,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a chosen view: a Gaussian along its rows into a buffer, or along the buffer's columns back,
    then the rest.
    """
    i_chosen, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_sample = tl.load(p_chosen + i_chosen)
    p_row = p_rows + i_sample * COLUMNS
    inverse_sigma = 1 / tl.load(p_row + SIGMA)
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < S * S
    b_y, b_x = o_pixel // S, o_pixel % S
    p_view = p_in + (i_sample if ROWS else i_chosen) * S * S * 3
    b_red, b_green, b_blue = b_x * 0.0, b_x * 0.0, b_x * 0.0
    total = 0.0
    for tap in range(0, TAPS):
        offset = tap - TAPS // 2
        distance = offset * inverse_sigma
        weight = tl.exp2(distance * distance * GAUSSIAN)
        # Borders are reflected without repeating the outermost pixel.
        b_source = tl.abs((b_x if ROWS else b_y) + offset)
        b_source = (S - 1) - tl.abs((S - 1) - b_source)
        o_source = (b_y * S + b_source if ROWS else b_source * S + b_x) * 3
        b_tap_red, b_tap_green, b_tap_blue = _read(p_view + o_source, m_pixel, False)
        b_red, b_green, b_blue = (
            b_red + weight * b_tap_red,
            b_green + weight * b_tap_green,
            b_blue + weight * b_tap_blue,
        )
        total += weight
    b_red, b_green, b_blue = b_red / total, b_green / total, b_blue / total
    if not ROWS:
        b_red = _finished(b_red, p_row, threshold, tl.load(p_colors), tl.load(p_colors + 3))
        b_green = _finished(b_green, p_row, threshold, tl.load(p_colors + 1), tl.load(p_colors + 4))
        b_blue = _finished(b_blue, p_row, threshold, tl.load(p_colors + 2), tl.load(p_colors + 5))
    p_target = p_out + (i_chosen if ROWS else i_sample) * S * S * 3 + o_pixel * 3
    _store(p_target, b_red, b_green, b_blue, p_row, p_colors, threshold, m_pixel, False)


def parameter_rows(drawn: ViewParameters) -> Tensor:
    """(B, COLUMNS) float32 on the CPU: one copy to the device instead of nine."""
    parts = (
        drawn.crop,
        drawn.reach,
        drawn.flip,
        drawn.jitter,
        drawn.factors,
        drawn.order,
        drawn.grayscale,
        drawn.blur_sigma,
        drawn.solarize,
    )
    return torch.cat([part.reshape(len(drawn), -1).to(torch.float32) for part in parts], dim=1)


@cache
def color_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Means and inverse standard deviations, (6,) float32, sent to a device once: a run has one or two pairs
    of them.
    """
    return torch.tensor([*mean, *(1 / value for value in std)], dtype=torch.float32, device=device)


@torch.no_grad()
def augment(images: Tensor, drawn: ViewParameters, look: Look) -> Tensor:
    """The views of (B, H, W, 3) uint8 images: (B, 3, size, size) float32, channels_last."""
    size, resize = look.size, look.resize
    device, count, pixels = images.device, len(images), size * size
    out = torch.empty(
        (count, 3, size, size), dtype=torch.float32, device=device, memory_format=torch.channels_last
    )
    if count == 0:
        return out
    images, threshold = images.contiguous(), look.solarize_threshold / 255
    rows, colors = (
        to_device(parameter_rows(drawn), device),
        color_constants(tuple(map(float, look.mean)), tuple(map(float, look.std)), device),
    )
    height, width = images.shape[1:3]
    flags = {"RESIZE": resize, "BICUBIC": look.interpolation == "bicubic"}
    with torch.cuda.device(device) if images.is_cuda else nullcontext():
        if pixels <= WHOLE_PIXELS:
            block = triton.next_power_of_2(pixels)
            whole_view_kernel[(count,)](
                images,
                rows,
                colors,
                out,
                height,
                width,
                size,
                threshold,
                **flags,
                BLOCK=block,
                num_warps=warps_for(block),
            )
        else:
            blocks, warps = triton.cdiv(pixels, BLOCK_PIXELS), warps_for(BLOCK_PIXELS)
            sums = torch.empty((count, blocks), dtype=torch.float32, device=device)
            crop_kernel[(count, blocks)](
                images,
                rows,
                colors,
                out,
                sums,
                height,
                width,
                size,
                threshold,
                **flags,
                BLOCK=BLOCK_PIXELS,
                num_warps=warps,
            )
            color_kernel[(count, blocks)](
                images, rows, colors, out, sums, size, threshold,
                BYTES=not resize, BLOCK=BLOCK_PIXELS, BLOCKS=triton.next_power_of_2(blocks), num_warps=warps,
            )  # fmt: skip
        _blur(out, drawn, rows, colors, threshold, look.blur_kernel)
    return out


def _blur(
    out: Tensor, drawn: ViewParameters, rows: Tensor, colors: Tensor, threshold: float, taps: int
) -> None:
    """Blur and finish the samples that were chosen for it, in place."""
    chosen = (drawn.blur_sigma > 0).nonzero().flatten()
    if len(chosen) == 0:
        return
    chosen = to_device(chosen, out.device)
    size = out.shape[-1]
    buffer = torch.empty((len(chosen), size, size, 3), dtype=torch.float32, device=out.device)
    grid = (len(chosen), triton.cdiv(size * size, BLOCK_PIXELS))
    launch = {"TAPS": taps, "BLOCK": BLOCK_PIXELS, "num_warps": warps_for(BLOCK_PIXELS)}
    blur_kernel[grid](out, chosen, rows, colors, buffer, size, threshold, ROWS=True, **launch)
    blur_kernel[grid](buffer, chosen, rows, colors, out, size, threshold, ROWS=False, **launch)


def warps_for(block: int) -> int:
    return max(1, min(16, block // PIXELS_PER_WARP))
