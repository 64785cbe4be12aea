"""How far the views of two engines are apart that were shown the same draws, in grey levels of 255."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

# Views are normalised by a mean and standard deviation of a half.
_GREY_LEVELS = 127.5


@dataclass(frozen=True)
class Difference:
    data: str
    views: str
    engine: str
    mean: float
    largest_inside: float
    largest_at_edge: float
    """Of the outermost pixels."""


@dataclass(frozen=True)
class ColourDifference:
    data: str
    views: str
    channel: str
    mean: float
    largest: float


def to_torchvision(data: str, views: str, shown: Mapping[str, Tensor]) -> Iterator[Difference]:
    """Of each engine's views (V, B, 3, S, S) to torchvision's; `dali yiq` is not meant to equal them."""
    for engine, pixels in shown.items():
        if engine in ("torchvision", "dali yiq"):
            continue
        gap = (pixels - shown["torchvision"]).abs() * _GREY_LEVELS
        edge = max(gap[..., [0, -1], :].max().item(), gap[..., [0, -1]].max().item())
        yield Difference(data, views, engine, gap.mean().item(), gap[..., 1:-1, 1:-1].max().item(), edge)


def of_yiq(data: str, views: str, shown: Mapping[str, Tensor]) -> Iterator[ColourDifference]:
    """Of `dali yiq` to `dali`, by channel; nothing where it was not shown."""
    if "dali yiq" in shown:
        gap = (shown["dali yiq"] - shown["dali"]).abs() * _GREY_LEVELS
        for name, channel in zip(("red", "green", "blue"), gap.unbind(2), strict=True):
            yield ColourDifference(data, views, name, channel.mean().item(), channel.max().item())
