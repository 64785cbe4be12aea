"""Frozen features: every image of a loader through an encoder once, on one process or on many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate.progress import shown

AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# 10,000 photos of 224 pixels would fill 6 GB as they are.
LARGEST_PIXEL_SIDE = 32


@dataclass(frozen=True)
class Features:
    """What an encoder says of N images, in the order of their index.

    >>> Features(torch.eye(3), torch.tensor([0, 0, 1]), torch.arange(3)).subset(torch.tensor([2])).labels
    tensor([1])
    """

    features: Tensor
    """(N, F) float32, on the CPU."""
    labels: Tensor | None
    """(N,) int64, or None without labels."""
    index: Tensor
    """(N,) int64, increasing: which image of the data set a row is."""

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, rows: Tensor) -> Features:
        """The given rows, (M,) int64."""
        return Features(
            self.features[rows], None if self.labels is None else self.labels[rows], self.index[rows]
        )

    def require_finite(self, owner: str) -> None:
        """Raises UsageError, naming `owner` and the first such image, if a feature is NaN or infinite."""
        bad = ~torch.isfinite(self.features).all(dim=1)
        if bad.any():
            raise UsageError(
                f"{owner}: the features of {int(bad.sum())} of {len(self)} images are NaN or infinite "
                "(first: image "
                f"{int(self.index[bad][0])}), so nothing can be measured on them. Did the training diverge? "
                "Take an earlier checkpoint, "
                "or train with a smaller optim.base_lr."
            )


def extract_features(
    encoder: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str,
    precision: str = "fp32",
    progress: bool = False,
) -> Features:
    """Features of a loader that yields one view an image: `encoder` maps (B, 3, S, S) on `device` to (B, F).

    Evaluation mode without gradient; every submodule's training mode is put back. `precision` (fp32, bf16,
    fp16) is the autocast type of the forward pass. With several ranks each one extracts the shard that its
    loader yields, and every rank gets all the rows. Raises ValueError if the loader yields several views or
    an image twice, or the encoder returns anything but (B, F).

    >>> from types import SimpleNamespace as Batch
    >>> batch = Batch(views=[torch.ones(2, 3, 4, 4)], index=torch.arange(2), label=None)
    >>> extract_features(nn.Flatten(), [batch], "cpu").features.shape
    torch.Size([2, 48])
    """
    views = extract_views(encoder, loader, device, precision, progress)
    if len(views) != 1:
        raise ValueError(
            f"The loader yields {len(views)} views an image; frozen features take exactly one. Use "
            "extract_views."
        )
    return views[0]


class Pixels(nn.Module):
    """No encoder: views (B, 3, S, S) flattened to (B, 3·S·S), averaged down to 32 × 32 first where they are
    larger.

    >>> Pixels()(torch.ones(2, 3, 224, 224)).shape
    torch.Size([2, 3072])
    """

    def forward(self, view: Tensor) -> Tensor:
        small = (
            F.adaptive_avg_pool2d(view, LARGEST_PIXEL_SIDE)
            if max(view.shape[-2:]) > LARGEST_PIXEL_SIDE
            else view
        )
        return small.flatten(1)


def raw_pixels(loader: Iterable[Any], progress: bool = False) -> Features:
    """The evaluation views themselves, as `Pixels` flattens them: the baseline that any encoder has to beat.

    >>> from types import SimpleNamespace as Batch
    >>> raw_pixels([Batch(views=[torch.ones(2, 3, 4, 4)], index=torch.arange(2), label=None)]).features.sum()
    tensor(96.)
    """
    return extract_features(Pixels(), loader, "cpu", progress=progress)


def extract_views(
    encoder: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str,
    precision: str = "fp32",
    progress: bool = False,
) -> tuple[Features, ...]:
    """As `extract_features`, for a loader that yields V views an image: one `Features` a view, their rows
    aligned.
    """
    device = torch.device(device)
    rows: list[list[Tensor]] = []
    index: list[Tensor] = []
    labels: list[Tensor] = []
    with _evaluation_mode(encoder), torch.no_grad():
        for batch in shown(loader, "features", progress):
            rows.append([_forward(encoder, view, device, precision) for view in batch.views])
            index.append(batch.index.to("cpu", torch.int64))
            if batch.label is not None:
                labels.append(batch.label.to("cpu", torch.int64))
    local = [torch.cat(view) for view in zip(*rows, strict=True)]
    local_index = torch.cat(index) if index else torch.empty(0, dtype=torch.int64)
    *gathered, all_labels, all_index = _gather(local, torch.cat(labels) if labels else None, local_index)
    order = all_index.argsort()
    _require_each_once(all_index[order])
    sorted_labels = None if all_labels is None else all_labels[order]
    return tuple(Features(view[order], sorted_labels, all_index[order]) for view in gathered)


def _forward(encoder: nn.Module, view: Tensor, device: torch.device, precision: str) -> Tensor:
    kind = AUTOCAST_TYPES[precision]
    with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
        features = encoder(view.to(device, non_blocking=True))
    if features.ndim != 2 or len(features) != len(view):
        raise ValueError(
            f"The encoder maps views {tuple(view.shape)} to {tuple(features.shape)}; evaluation needs (B, F)."
        )
    return features.to("cpu", torch.float32)


@contextmanager
def _evaluation_mode(encoder: nn.Module) -> Iterator[None]:
    # Flag by flag: `encoder.train()` afterwards would thaw a batch norm that the user had frozen.
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gather(views: list[Tensor], labels: Tensor | None, index: Tensor) -> list[Any]:
    """Views (n, F) each, labels (n,) or None and index (n,) of this rank -> those of all ranks, one after the
    other.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if not views:
            raise UsageError(
                "The loader yields no batch: not one image could be read, so there are no features."
            )
        return [*views, labels, index]
    headers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(headers, (len(index), [view.shape[1] for view in views], labels is not None))
    counts = [count for count, _, _ in headers]
    if sum(counts) == 0:
        raise UsageError(
            "The loader yields no batch on any rank: not one image could be read, so there are no features."
        )
    # A rank whose shard is empty knows neither the width nor whether there are labels.
    widths, labelled = next((widths, labelled) for count, widths, labelled in headers if count)
    views = views or [torch.empty(0, width) for width in widths]
    gathered = [_gather_rows(view, counts) for view in views]
    all_labels = _gather_rows(index[:0] if labels is None else labels, counts) if labelled else None
    return [*gathered, all_labels, _gather_rows(index, counts)]


def _gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """This rank's rows -> all ranks' rows. `counts`: how many each rank has; padded, because collectives want
    equal shapes.
    """
    place = (
        torch.device("cuda", torch.cuda.current_device())
        if "nccl" in dist.get_backend()
        else torch.device("cpu")
    )
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=place)
    padded[: len(rows)] = rows.to(place)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])


def _require_each_once(index: Tensor) -> None:
    repeated = index[1:][index[1:] == index[:-1]]
    if len(repeated):
        raise ValueError(
            f"The loader yields {len(repeated)} images more than once (first: image {int(repeated[0])}); an "
            "evaluation loader covers each "
            "image exactly once. With several ranks, give each rank its own shard."
        )
