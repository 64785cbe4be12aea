"""What a view is, in torchvision's units, and the sets of views that papers published.

`ViewSpec` is the only list of a view's parameters. The configuration's section has fields of the same names,
and `view_preset` takes it whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastgessl.kernels.views.parameters import Color
from fastgessl.pipelines.sources import DataError

Range = tuple[float, float]

_JITTER = ("brightness", "contrast", "saturation", "hue")
# Fields that have a value of their own in local views.
_OF_LOCAL = {"local_size": "size", "local_crop_scale": "crop_scale"}


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view. `repeat` such views are drawn from each image, each with a draw of its own.

    The operations in their order: random resized crop, flip, colour jitter in a random order, grayscale,
    blur, solarize, normalize. Raises DataError if a value is out of its range.
    """

    size: int
    """Side of the view, pixels."""
    mean: Color
    """Channel means to subtract, pixel values in [0, 1]."""
    std: Color
    """Channel standard deviations to divide by, pixel values in [0, 1]."""
    crop_scale: Range = (0.08, 1.0)
    """Share of the image's area that a crop keeps."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width by height of a crop."""
    resize_short: int = 0
    """Above 0: no random crop; the short side is resized to this many pixels and the center is cropped."""
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
        chances = [name for name in vars(self) if name.endswith("_probability")]
        strengths = ("brightness", "contrast", "saturation")
        kernel_fits = self.blur_kernel % 2 == 1 and self.blur_kernel // 2 < self.size
        kernels = f"odd and at most {2 * self.size - 1} for a view of {self.size} pixels"
        short_fits = self.resize_short == 0 or self.resize_short >= self.size
        rules = [
            *((name, getattr(self, name) >= 1, "at least 1") for name in ("size", "repeat")),
            *((name, 0 <= getattr(self, name) <= 1, "in [0, 1]") for name in chances),
            *((name, getattr(self, name) >= 0, "0 or more") for name in strengths),
            ("hue", 0 <= self.hue <= 0.5, "in [0, 0.5] turns"),
            ("crop_scale", _ordered(self.crop_scale, 1), "two ordered shares within (0, 1]"),
            ("crop_ratio", _ordered(self.crop_ratio), "two ordered positive numbers"),
            ("blur_sigma", _ordered(self.blur_sigma), "two ordered positive numbers of pixels"),
            ("resize_short", short_fits, f"0 or at least {self.size}"),
            ("interpolation", self.interpolation in ("bilinear", "bicubic"), "bilinear or bicubic"),
            ("color", self.color in ("torchvision", "yiq"), "torchvision or yiq"),
            ("std", min(self.std) > 0, "positive"),
            ("blur_kernel", self.blur_probability == 0 or kernel_fits, kernels),
        ]
        for name, holds, expected in rules:
            _require(holds, name, getattr(self, name), expected)

    @cached_property
    def look(self) -> dict[str, Any]:
        """What `color_views` and `augment_views` are told of every view of this kind, beside its draw."""
        names = ("mean", "std", "blur_kernel", "solarize_threshold")
        return {name: getattr(self, name) for name in names}


def _ordered(values: Range, most: float = math.inf) -> bool:
    return 0 < values[0] <= values[1] <= most


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise DataError(f"views: {name} must be {expected}, found {found}. Change that value.")


def count_views(views: Sequence[ViewSpec]) -> tuple[int, int]:
    """(global, local) views of an image: a batch's list holds the first kind, then the second.

    >>> count_views([ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), repeat=2)])
    (2, 0)
    """
    local = sum(spec.repeat for spec in views if spec.local)
    return sum(spec.repeat for spec in views) - local, local


def evaluation_view(size: int, *, mean: Color, std: Color) -> ViewSpec:
    """One view without chance: short side resized to 256/224 of `size` (to `size` itself below 96 pixels),
    center cropped.

    >>> evaluation_view(224, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).resize_short
    256
    """
    short = round(size * 256 / 224) if size >= 96 else size
    return ViewSpec(size, mean, std, resize_short=short, flip_probability=0.0, jitter_probability=0.0)


@dataclass(frozen=True)
class _Preset:
    """What a recipe changes of `ViewSpec`: an entry per global view, and what a local view is like, whether
    or not the recipe has any.
    """

    full: tuple[dict[str, Any], ...]
    local: dict[str, Any]
    local_views: int = 0

    def cropped(self, scale: Range, local_views: int) -> "_Preset":
        """The same with global views of another `scale`, and with local views."""
        return _Preset(tuple(view | {"crop_scale": scale} for view in self.full), self.local, local_views)


def _jitter(*strengths: float) -> dict[str, Any]:
    return dict(zip(_JITTER, strengths, strict=True))


# Chen et al., ICML 2020, appendix A. Local views are SwAV's.
_COLORS = _jitter(0.8, 0.8, 0.8, 0.2) | {"blur_probability": 0.5}
_SIMCLR = _Preset((_COLORS, _COLORS), _COLORS | {"crop_scale": (0.05, 0.14)})
# MoCo v2: Chen et al., arXiv 2003.04297, and its code. Local views are SwAV's.
_WEAK = _jitter(0.4, 0.4, 0.4, 0.1) | {"blur_probability": 0.5, "crop_scale": (0.2, 1.0)}
_MOCO = _Preset((_WEAK, _WEAK), _WEAK | {"crop_scale": (0.05, 0.14)})
# Grill et al., NeurIPS 2020, table 6: the views differ in blur and solarization. Local views are DINO's.
_SOFT = _jitter(0.4, 0.4, 0.2, 0.1) | {"interpolation": "bicubic"}
_BYOL = _Preset(
    (_SOFT | {"blur_probability": 1.0}, _SOFT | {"blur_probability": 0.1, "solarize_probability": 0.2}),
    _SOFT | {"blur_probability": 0.5, "crop_scale": (0.05, 0.4)},
)
# Dubois et al., NeurIPS 2022, and the TinyImageNet table of its code: coarser views that keep the label,
# SimCLR's at twice its color strength.
_STRONG = _jitter(1.6, 1.6, 1.6, 0.4)
_DISSL = _Preset(tuple(view | _STRONG for view in _SIMCLR.full), _SIMCLR.local | _STRONG)
_PRESETS = {
    "simclr": _SIMCLR,
    "moco": _MOCO,
    "byol": _BYOL,
    "barlow": _BYOL,
    # Caron et al., NeurIPS 2020: 2 large and 6 small crops.
    "swav": _SIMCLR.cropped((0.14, 1.0), local_views=6),
    # Caron et al., ICCV 2021, and its code: BYOL's two views of a larger share, and 8 local ones.
    "dino": _BYOL.cropped((0.4, 1.0), local_views=8),
    "dissl": _DISSL,
}


def view_preset(preset: str, size: int, *, mean: Color, std: Color, **changes: Any) -> tuple[ViewSpec, ...]:
    """The views of a published recipe for images of `size` pixels: one entry per view, global ones first.

    `preset`: simclr, moco (v2), byol (asymmetric), barlow (BYOL's), swav (2 + 6 crops), dino (2 + 8 crops) or
    dissl (SimCLR's, twice the color). `changes` are fields of `ViewSpec` and replace the recipe's values;
    None keeps them. A probability is one number for every view, or one per global view, and perhaps one more
    for all local ones. `crop_scale` is that of global views. Besides: `global_views` (the recipe's are
    repeated in turn), `local_views` of `local_size` pixels (96 where `size` is 224) and of
    `local_crop_scale`, and `jitter_strength`, which multiplies the recipe's brightness, contrast, saturation
    and hue. Raises DataError for an unknown name or a value out of range.

    >>> views = view_preset("byol", 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), local_views=4)
    >>> [(view.size, view.local, view.solarize_probability) for view in views[:3]]
    [(32, False, 0.0), (32, False, 0.2), (14, True, 0.0)]
    """
    if preset not in _PRESETS:
        raise DataError(f"views.preset {preset!r} is unknown. Choose one of {', '.join(_PRESETS)}.")
    recipe = _PRESETS[preset]
    given: dict[str, Any] = {
        "size": size,
        "mean": mean,
        "std": std,
        "local_size": max(1, round(size * 96 / 224)),
    }
    given |= {name: value for name, value in changes.items() if value is not None}
    global_views = given.pop("global_views", len(recipe.full))
    local_views = given.pop("local_views", recipe.local_views)
    strength = given.pop("jitter_strength", 1.0)
    smaller = f"from 1 to views.size {size}: a local view is no larger than a global one"
    _require(size >= 1, "size", size, "at least 1")
    _require(global_views >= 1, "global_views", global_views, "at least 1")
    _require(local_views >= 0, "local_views", local_views, "0 or more")
    _require(strength >= 0, "jitter_strength", strength, "0 or more")
    _require(1 <= given["local_size"] <= size, "local_size", given["local_size"], smaller)
    views = []
    for number in range(global_views + local_views):
        kind = recipe.local if number >= global_views else recipe.full[number % len(recipe.full)]
        jitter = {name: strength * kind[name] for name in _JITTER}
        values = _for_view(given, number, global_views)
        # 23 taps at 224 pixels, as every paper has it; in proportion at other sizes, odd, at least 3.
        taps = max(3, round(values["size"] * 23 / 224) // 2 * 2 + 1)
        defaults = {"grayscale_probability": 0.2, "blur_kernel": taps}
        views.append(ViewSpec(**(defaults | kind | jitter | values)))
    return tuple(views)


def _for_view(given: dict[str, Any], number: int, global_views: int) -> dict[str, Any]:
    """The part of what is `given` that concerns view `number`, by the fields of `ViewSpec`."""
    values: dict[str, Any] = {"local": number >= global_views}
    for name, value in given.items():
        field = _OF_LOCAL.get(name, name)
        if field in _OF_LOCAL.values() and (name in _OF_LOCAL) != values["local"]:
            continue
        chances = field.endswith("_probability") and isinstance(value, Sequence)
        found = _chance(field, value, number, global_views) if chances else value
        if found is not None:
            values[field] = found
    return values


def _chance(name: str, chances: Sequence[float], number: int, global_views: int) -> float | None:
    """The one of `chances` that view `number` has; None leaves a local view the recipe's."""
    allowed = (
        f"one number, or {global_views}, one per global view, or {global_views + 1}, the last for all local "
        "views"
    )
    _require(len(chances) in (1, global_views, global_views + 1), name, tuple(chances), allowed)
    if len(chances) == 1:
        return chances[0]
    number = min(number, global_views)
    return chances[number] if number < len(chances) else None
