"""What a view is: sizes, ranges and chances in torchvision's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgessl.pipelines.errors import DataError

Range = tuple[float, float]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view. `repeat` such views are drawn from each image, each with a draw of its own.

    The operations in their order: random resized crop, flip, colour jitter in a random order, grayscale,
    blur, solarize, normalise. Raises DataError if a value is out of its range.
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
    color: str = "torchvision"
    """How jitter and grayscale are done. torchvision: its operations, hue in HSV, in each sample's own order.
    yiq: DALI's, hue in YIQ, in one order; the dali engine only."""
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
    local: bool = False
    """A small crop of multi-crop recipes: methods show it to the student only."""

    def __post_init__(self) -> None:
        for operation in ("flip", "jitter", "grayscale", "blur", "solarize"):
            name = f"{operation}_probability"
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "two ordered shares within (0, 1]")
        low, high = self.crop_ratio
        require(0 < low <= high, "crop_ratio", self.crop_ratio, "two ordered positive numbers")
        low, high = self.blur_sigma
        require(0 < low <= high, "blur_sigma", self.blur_sigma, "two ordered positive numbers of pixels")
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.hue <= 0.5, "hue", self.hue, "in [0, 0.5] turns")
        require(
            self.size >= 1 and self.repeat >= 1, "size and repeat", (self.size, self.repeat), "at least 1"
        )
        require(
            self.resize_short == 0 or self.resize_short >= self.size,
            "resize_short",
            self.resize_short,
            f"0 or at least {self.size}",
        )
        require(
            self.interpolation in ("bilinear", "bicubic"),
            "interpolation",
            self.interpolation,
            "bilinear or bicubic",
        )
        require(self.color in ("torchvision", "yiq"), "color", self.color, "torchvision or yiq")
        require(all(value > 0 for value in self.std), "std", self.std, "positive")
        if self.blur_probability > 0:
            fits = self.blur_kernel % 2 == 1 and self.blur_kernel // 2 < self.size
            require(
                fits,
                "blur_kernel",
                self.blur_kernel,
                f"odd and at most {2 * self.size - 1} for a view of {self.size} pixels",
            )


def require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise DataError(f"views: {name} must be {expected}, found {found}. Change that value.")


def count_views(views: Sequence[ViewSpec]) -> tuple[int, int]:
    """(global, local) views of an image: a batch's list holds the first kind, then the second.

    >>> count_views([ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), repeat=2)])
    (2, 0)
    """
    return sum(spec.repeat for spec in views if not spec.local), sum(
        spec.repeat for spec in views if spec.local
    )


def evaluation_view(size: int, *, mean: Colour, std: Colour) -> ViewSpec:
    """One view without chance: short side resized to 256/224 of `size` (to `size` itself below 96 pixels),
    centre cropped.

    >>> evaluation_view(224, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).resize_short
    256
    """
    short = round(size * 256 / 224) if size >= 96 else size
    return ViewSpec(
        size=size, mean=mean, std=std, resize_short=short, flip_probability=0.0, jitter_probability=0.0
    )
