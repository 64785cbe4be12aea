"""What a view is: sizes, ranges and chances in torchvision's units, and the sets of them that papers published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastgessl.pipelines.errors import DataError

Range = tuple[float, float]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view. `repeat` such views are drawn from each image, each with a draw of its own.

    The operations in their order: random resized crop, flip, colour jitter in a random order, grayscale, blur, solarize, normalise.
    Raises DataError if a value is out of its range.
    """

    size: int
    """Side of the view, pixels."""
    mean: Colour
    """Channel means to subtract, pixel values in [0, 1]."""
    std: Colour
    """Channel standard deviations to divide by, pixel values in [0, 1]."""
    crop_scale: Range = (0.08, 1.0)
    """Share of the image's area that a crop keeps."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width by height of a crop."""
    resize_short: int = 0
    """Above 0: no random crop; the short side is resized to so many pixels and the centre is cropped."""
    interpolation: str = "bilinear"
    """bilinear or bicubic, always antialiased."""
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.0
    """Factor in [1 - brightness, 1 + brightness]; likewise contrast and saturation."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Shift in [-hue, hue], turns."""
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_kernel: int = 23
    """Taps, odd."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation, pixels."""
    solarize_probability: float = 0.0
    solarize_threshold: float = 128.0
    """Values from here on (0 to 255) are inverted."""
    repeat: int = 1

    def __post_init__(self) -> None:
        for operation in ("flip", "jitter", "grayscale", "blur", "solarize"):
            name = f"{operation}_probability"
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "two ordered shares within (0, 1]")
        low, high = self.crop_ratio
        _require(0 < low <= high, "crop_ratio", self.crop_ratio, "two ordered positive numbers")
        low, high = self.blur_sigma
        _require(0 < low <= high, "blur_sigma", self.blur_sigma, "two ordered positive numbers of pixels")
        for name in ("brightness", "contrast", "saturation"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(0 <= self.hue <= 0.5, "hue", self.hue, "in [0, 0.5] turns")
        _require(self.size >= 1 and self.repeat >= 1, "size and repeat", (self.size, self.repeat), "at least 1")
        _require(self.resize_short == 0 or self.resize_short >= self.size, "resize_short", self.resize_short, f"0 or at least {self.size}")
        _require(self.interpolation in ("bilinear", "bicubic"), "interpolation", self.interpolation, "bilinear or bicubic")
        _require(all(value > 0 for value in self.std), "std", self.std, "positive")
        if self.blur_probability > 0:
            fits = self.blur_kernel % 2 == 1 and self.blur_kernel // 2 < self.size
            _require(fits, "blur_kernel", self.blur_kernel, f"odd and at most {2 * self.size - 1} for a view of {self.size} pixels")


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise DataError(f"views: {name} must be {expected}, found {found}. Change that value.")


def _jittered(base: ViewSpec, strength: float, brightness: float, contrast: float, saturation: float, hue: float) -> ViewSpec:
    return replace(
        base, brightness=strength * brightness, contrast=strength * contrast, saturation=strength * saturation, hue=strength * hue
    )


def _simclr(base: ViewSpec, strength: float) -> tuple[ViewSpec, ...]:
    """Chen et al., ICML 2020, appendix A."""
    return (replace(_jittered(base, strength, 0.8, 0.8, 0.8, 0.2), blur_probability=0.5, repeat=2),)


def _moco(base: ViewSpec, strength: float) -> tuple[ViewSpec, ...]:
    """MoCo v2: Chen et al., arXiv 2003.04297, and its code."""
    return (replace(_jittered(base, strength, 0.4, 0.4, 0.4, 0.1), crop_scale=(0.2, 1.0), blur_probability=0.5, repeat=2),)


def _byol(base: ViewSpec, strength: float) -> tuple[ViewSpec, ...]:
    """Grill et al., NeurIPS 2020, table 6: the two views differ in blur and solarisation."""
    base = replace(_jittered(base, strength, 0.4, 0.4, 0.2, 0.1), interpolation="bicubic")
    return replace(base, blur_probability=1.0), replace(base, blur_probability=0.1, solarize_probability=0.2)


def _swav(base: ViewSpec, strength: float) -> tuple[ViewSpec, ...]:
    """Caron et al., NeurIPS 2020: 2 large and 6 small crops."""
    base = replace(_jittered(base, strength, 0.8, 0.8, 0.8, 0.2), blur_probability=0.5)
    return replace(base, crop_scale=(0.14, 1.0), repeat=2), _local(base, (0.05, 0.14), 6)


def _dino(base: ViewSpec, strength: float) -> tuple[ViewSpec, ...]:
    """Caron et al., ICCV 2021, and its code: BYOL's two views of a larger share, and 8 local ones."""
    base = replace(_jittered(base, strength, 0.4, 0.4, 0.2, 0.1), interpolation="bicubic", crop_scale=(0.4, 1.0))
    first, second = replace(base, blur_probability=1.0), replace(base, blur_probability=0.1, solarize_probability=0.2)
    return first, second, _local(replace(base, blur_probability=0.5), (0.05, 0.4), 8)


def _local(base: ViewSpec, crop_scale: Range, repeat: int) -> ViewSpec:
    """Local crops have 96 pixels where the large ones have 224."""
    size = max(1, round(base.size * 96 / 224))
    return replace(base, size=size, crop_scale=crop_scale, repeat=repeat, blur_kernel=_blur_kernel(size))


def _blur_kernel(size: int) -> int:
    """The largest odd number of taps within a tenth of the view (SimCLR), at least 3; 23 at 224 pixels, as every paper has it."""
    return max(3, round(size * 23 / 224) // 2 * 2 + 1)


_PRESETS = {"simclr": _simclr, "moco": _moco, "byol": _byol, "barlow": _byol, "swav": _swav, "dino": _dino}


def view_preset(
    name: str,
    size: int,
    *,
    mean: Colour,
    std: Colour,
    crop_scale: Range | None = None,
    flip_probability: float | None = None,
    jitter_probability: float | None = None,
    jitter_strength: float = 1.0,
    grayscale_probability: float | None = None,
    blur_probability: float | None = None,
    solarize_probability: float | None = None,
) -> tuple[ViewSpec, ...]:
    """The views of a published recipe for images of `size` pixels; what is given replaces the recipe's value in every view
    (`crop_scale` in those of the full size).

    simclr, moco, byol (asymmetric), barlow (BYOL's), swav (2 + 6 crops) and dino (2 + 8 crops). `jitter_strength` multiplies the
    brightness, contrast, saturation and hue ranges. Raises DataError for an unknown name or a value out of range.

    >>> first, second = view_preset("byol", 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), blur_probability=0.0)
    >>> first.solarize_probability, second.solarize_probability, second.blur_probability
    (0.0, 0.2, 0.0)
    """
    if name not in _PRESETS:
        raise DataError(f"views.preset {name!r} is unknown. Choose one of {', '.join(_PRESETS)}.")
    _require(jitter_strength >= 0, "jitter_strength", jitter_strength, "0 or more")
    base = ViewSpec(size=size, mean=mean, std=std, grayscale_probability=0.2, blur_kernel=_blur_kernel(size))
    given = {
        "flip_probability": flip_probability,
        "jitter_probability": jitter_probability,
        "grayscale_probability": grayscale_probability,
        "blur_probability": blur_probability,
        "solarize_probability": solarize_probability,
    }
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    specs = tuple(replace(spec, **changes) for spec in _PRESETS[name](base, jitter_strength))
    if crop_scale is None:
        return specs
    return tuple(replace(spec, crop_scale=crop_scale) if spec.size == size else spec for spec in specs)


def evaluation_view(size: int, *, mean: Colour, std: Colour) -> ViewSpec:
    """One view without chance: short side resized to 256/224 of `size` (to `size` itself below 96 pixels), centre cropped.

    >>> evaluation_view(224, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).resize_short
    256
    """
    short = round(size * 256 / 224) if size >= 96 else size
    return ViewSpec(size=size, mean=mean, std=std, resize_short=short, flip_probability=0.0, jitter_probability=0.0)
