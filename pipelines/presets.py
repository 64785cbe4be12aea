"""The sets of views that papers published, and what may be changed of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.specs import Colour, Range, ViewSpec, require


@dataclass(frozen=True)
class _Preset:
    """The global views, one entry each, and what a local view is like, whether or not the recipe has any."""

    full: tuple[ViewSpec, ...]
    local: ViewSpec
    local_views: int = 0


def _jittered(base: ViewSpec, brightness: float, contrast: float, saturation: float, hue: float) -> ViewSpec:
    return replace(base, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def _simclr(base: ViewSpec) -> _Preset:
    """Chen et al., ICML 2020, appendix A. Local views are SwAV's."""
    base = replace(_jittered(base, 0.8, 0.8, 0.8, 0.2), blur_probability=0.5)
    return _Preset((base, base), replace(base, crop_scale=(0.05, 0.14)))


def _moco(base: ViewSpec) -> _Preset:
    """MoCo v2: Chen et al., arXiv 2003.04297, and its code. Local views are SwAV's."""
    base = replace(_jittered(base, 0.4, 0.4, 0.4, 0.1), crop_scale=(0.2, 1.0), blur_probability=0.5)
    return _Preset((base, base), replace(base, crop_scale=(0.05, 0.14)))


def _byol(base: ViewSpec) -> _Preset:
    """Grill et al., NeurIPS 2020, table 6: the two views differ in blur and solarisation. Local views are
    DINO's.
    """
    base = replace(_jittered(base, 0.4, 0.4, 0.2, 0.1), interpolation="bicubic")
    first, second = (
        replace(base, blur_probability=1.0),
        replace(base, blur_probability=0.1, solarize_probability=0.2),
    )
    return _Preset((first, second), replace(base, crop_scale=(0.05, 0.4), blur_probability=0.5))


def _swav(base: ViewSpec) -> _Preset:
    """Caron et al., NeurIPS 2020: 2 large and 6 small crops."""
    simclr = _simclr(base)
    return replace(
        simclr, full=tuple(replace(spec, crop_scale=(0.14, 1.0)) for spec in simclr.full), local_views=6
    )


def _dino(base: ViewSpec) -> _Preset:
    """Caron et al., ICCV 2021, and its code: BYOL's two views of a larger share, and 8 local ones."""
    byol = _byol(base)
    return replace(
        byol, full=tuple(replace(spec, crop_scale=(0.4, 1.0)) for spec in byol.full), local_views=8
    )


def _dissl(base: ViewSpec) -> _Preset:
    """Dubois et al., NeurIPS 2022, and the TinyImageNet table of its code: coarser views that keep the label,
    SimCLR's at twice its colour strength."""
    simclr = _simclr(base)
    full = tuple(_strengthened(spec, 2.0) for spec in simclr.full)
    return replace(simclr, full=full, local=_strengthened(simclr.local, 2.0))


_PRESETS = {
    "simclr": _simclr,
    "moco": _moco,
    "byol": _byol,
    "barlow": _byol,
    "swav": _swav,
    "dino": _dino,
    "dissl": _dissl,
}


def view_preset(
    name: str,
    size: int,
    *,
    mean: Colour,
    std: Colour,
    crop_scale: Range | None = None,
    global_views: int | None = None,
    local_views: int | None = None,
    local_size: int | None = None,
    local_crop_scale: Range | None = None,
    flip_probability: float | None = None,
    jitter_probability: float | None = None,
    jitter_strength: float = 1.0,
    color: str = "torchvision",
    grayscale_probability: float | None = None,
    blur_probability: float | Sequence[float] | None = None,
    solarize_probability: float | Sequence[float] | None = None,
) -> tuple[ViewSpec, ...]:
    """The views of a published recipe for images of `size` pixels, one entry a view, global ones first; what
    is given replaces the recipe's value.

    simclr, moco (v2), byol (asymmetric), barlow (BYOL's), swav (2 + 6 crops), dino (2 + 8 crops) and dissl
    (SimCLR's, twice the colour). `crop_scale` is that of global views. `local_views` local ones of
    `local_size` pixels (96 where `size` is 224) and `local_crop_scale` may be asked of every preset; further
    `global_views` repeat the recipe's in turn. `blur_probability` and `solarize_probability` are one number
    for every view, or one a global view, and perhaps one more for all local ones. `jitter_strength`
    multiplies the brightness, contrast, saturation and hue ranges; `color` is that of `ViewSpec`. Raises
    DataError for an unknown name or a value out of range.

    >>> views = view_preset("byol", 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), blur_probability=0.0, local_views=4)
    >>> [(view.size, view.local, view.solarize_probability) for view in views[:3]]
    [(32, False, 0.0), (32, False, 0.2), (14, True, 0.0)]
    """
    if name not in _PRESETS:
        raise DataError(f"views.preset {name!r} is unknown. Choose one of {', '.join(_PRESETS)}.")
    require(jitter_strength >= 0, "jitter_strength", jitter_strength, "0 or more")
    require(size >= 1, "size", size, "at least 1")
    preset = _PRESETS[name](
        ViewSpec(
            size=size,
            mean=mean,
            std=std,
            color=color,
            grayscale_probability=0.2,
            blur_kernel=_blur_kernel(size),
        )
    )
    full = _global_views(preset.full, len(preset.full) if global_views is None else global_views, crop_scale)
    local = _local_views(preset, size, local_views, local_size, local_crop_scale)
    given = {
        "flip_probability": flip_probability,
        "jitter_probability": jitter_probability,
        "grayscale_probability": grayscale_probability,
    }
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    views = [replace(_strengthened(spec, jitter_strength), **changes) for spec in (*full, *local)]
    for field, chances in (
        ("blur_probability", blur_probability),
        ("solarize_probability", solarize_probability),
    ):
        views = _with_chances(views, field, chances, len(full))
    return tuple(views)


def _global_views(full: tuple[ViewSpec, ...], count: int, crop_scale: Range | None) -> list[ViewSpec]:
    require(count >= 1, "global_views", count, "at least 1")
    views = [full[view % len(full)] for view in range(count)]
    return views if crop_scale is None else [replace(spec, crop_scale=crop_scale) for spec in views]


def _local_views(
    preset: _Preset, size: int, count: int | None, local_size: int | None, crop_scale: Range | None
) -> list[ViewSpec]:
    """Local crops have 96 pixels where the global ones have 224."""
    count = preset.local_views if count is None else count
    local_size = max(1, round(size * 96 / 224)) if local_size is None else local_size
    require(count >= 0, "local_views", count, "0 or more")
    require(
        1 <= local_size <= size,
        "local_size",
        local_size,
        f"from 1 to views.size {size}: a local view is no larger than a global one",
    )
    if count == 0:
        return []
    crop_scale = preset.local.crop_scale if crop_scale is None else crop_scale
    local = replace(
        preset.local, size=local_size, crop_scale=crop_scale, blur_kernel=_blur_kernel(local_size), local=True
    )
    return [local] * count


def _with_chances(
    views: list[ViewSpec], field: str, chances: float | Sequence[float] | None, global_views: int
) -> list[ViewSpec]:
    if chances is None:
        return views
    given = list(chances) if isinstance(chances, Sequence) else [chances]
    local_views = len(views) - global_views
    each: dict[int, list[float | None]] = {
        global_views: [*given, *[None] * local_views],
        global_views + 1: [*given[:-1], *given[-1:] * local_views],
        1: [*given * len(views)],
    }
    allowed = f"one number, or {global_views}, one a global view, or {global_views + 1}, the last for all local views"
    require(len(given) in each, field, tuple(given), allowed)
    changes: list[dict[str, Any]] = [{} if chance is None else {field: chance} for chance in each[len(given)]]
    return [replace(spec, **change) for spec, change in zip(views, changes, strict=True)]


def _strengthened(spec: ViewSpec, strength: float) -> ViewSpec:
    return _jittered(
        spec,
        strength * spec.brightness,
        strength * spec.contrast,
        strength * spec.saturation,
        strength * spec.hue,
    )


def _blur_kernel(size: int) -> int:
    """Taps: 23 at 224 pixels, as every paper has it; in proportion at other sizes, rounded, an even number up
    by one; at least 3.

    >>> [_blur_kernel(size) for size in (224, 96, 32)]
    [23, 11, 3]
    """
    return max(3, round(size * 23 / 224) // 2 * 2 + 1)
