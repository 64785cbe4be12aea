"""Frozen features: every image of a loader through an encoder once, on one process or on many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.distributed import world_group

# 10,000 photos of 224 pixels would fill 6 GB as they are.
LARGEST_PIXEL_SIDE = 32
# The pairs of uniformity and retrieval grow with the square of the images: 4,096 take 7 s a row on two busy
# cores.
VIEWED_IMAGES = 4096
Item = TypeVar("Item")
Found = TypeVar("Found")


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

    def subset(self, rows: Tensor) -> "Features":
        """The given rows, (M,) int64, or (N,) bool."""
        labels = None if self.labels is None else self.labels[rows]
        return Features(self.features[rows], labels, self.index[rows])

    def accuracy_of(self, predicted: Tensor) -> float:
        """Share of labelled images whose label is the predicted one, (N,) int64."""
        assert self.labels is not None
        return predicted.eq(self.labels).double().mean().item()

    def require_finite(self, owner: str) -> None:
        """Raises UsageError, naming `owner` and the first such image, if a feature is NaN or infinite."""
        bad = ~torch.isfinite(self.features).all(dim=1)
        if bad.any():
            raise UsageError(
                f"{owner}: the features of {int(bad.sum())} of {len(self)} images are NaN or infinite "
                f"(first: image {int(self.index[bad][0])}), so nothing can be measured on them. Did the "
                "training diverge? Take an earlier checkpoint, or train with a smaller optim.base_lr."
            )

    def hold_out(self, held: Tensor) -> "tuple[Features, Features]":
        """(kept, held out), where there is no test split; `held` (H,) are numbers of images, not of rows."""
        judged = torch.isin(self.index, held)
        return self.subset(~judged), self.subset(judged)


@dataclass(frozen=True)
class RowFeatures:
    """All features of one encoder, a row of the tables, on one data set."""

    train: Features
    test: Features
    views: tuple[Features, ...] | None = None
    """Two augmented views of each image of a `view_sample`; None if there are none."""
    pool: Features | None = None
    """Images that few-shot episodes are drawn from; None draws from the test images."""
    held_out: bool = False
    """Whether the test images were taken from the training images."""
    device: torch.device | str = "cpu"
    """Where a probe that is trained step by step is trained."""

    @property
    def episodes(self) -> Features:
        """What few-shot episodes are drawn from."""
        return self.test if self.pool is None else self.pool

    @property
    def width(self) -> int:
        """F."""
        return self.train.features.shape[1]

    @property
    def classes(self) -> int:
        """How many classes the training labels have; 0 without labels."""
        return 0 if self.train.labels is None else len(self.train.labels.unique())

    @property
    def view_pair(self) -> tuple[Tensor, Tensor]:
        """Both views of each image, (N, F) each."""
        assert self.views is not None
        first, second = self.views
        return first.features, second.features


def view_sample(count: int, seed: int) -> Tensor:
    """Which of `count` images augmented views are looked at: at most 4,096, increasing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:VIEWED_IMAGES].sort().values


def extract_features(
    encoder: nn.Module, loader: Iterable[Any], device: torch.device | str, progress: bool = False
) -> Features:
    """Features of a loader that yields one view per image: `encoder` maps (B, 3, S, S) on `device` to (B, F).

    Evaluation mode without gradient; every submodule's training mode is put back. With several ranks each one
    extracts the shard that its loader yields, and every rank gets all the rows. Raises ValueError if the
    loader yields several views or an image twice, or the encoder returns anything but (B, F).

    >>> from types import SimpleNamespace as Batch
    >>> batch = Batch(views=[torch.ones(2, 3, 4, 4)], index=torch.arange(2), label=None)
    >>> extract_features(nn.Flatten(), [batch], "cpu").features.shape
    torch.Size([2, 48])
    """
    views = extract_views(encoder, loader, device, progress)
    if len(views) != 1:
        raise ValueError(
            f"The loader yields {len(views)} views an image; frozen features take exactly one. Use "
            "extract_views."
        )
    return views[0]


def extract_views(
    encoder: nn.Module, loader: Iterable[Any], device: torch.device | str, progress: bool = False
) -> tuple[Features, ...]:
    """As `extract_features`, for a loader that yields V views per image: one `Features` per view, their rows
    aligned.
    """
    mine: list[tuple[list[Tensor], Tensor | None, Tensor]] = []
    with _evaluation_mode(encoder), torch.no_grad():
        for batch in with_progress(loader, "features", progress):
            label = None if batch.label is None else batch.label.to("cpu", torch.int64)
            views = [_forward(encoder, view, device) for view in batch.views]
            mine.append((views, label, batch.index.to("cpu", torch.int64)))
    # A rank whose shard is empty knows neither the width nor whether there are labels.
    batches = [batch for part in gathered(mine) for batch in part]
    if not batches:
        raise UsageError("The loader yields no batch: not one image could be read, so there are no features.")
    index, order = torch.cat([rows for _, _, rows in batches]).sort()
    _require_each_once(index)
    known = [label for _, label, _ in batches if label is not None]
    labels = torch.cat(known)[order] if known else None
    aligned = zip(*(views for views, _, _ in batches), strict=True)
    return tuple(Features(torch.cat(view)[order], labels, index) for view in aligned)


class Pixels(nn.Module):
    """No encoder, the baseline that any encoder has to beat: views (B, 3, S, S) flattened to (B, 3·S·S),
    averaged down to 32 × 32 first where they are larger.

    >>> Pixels()(torch.ones(2, 3, 224, 224)).shape
    torch.Size([2, 3072])
    """

    def forward(self, view: Tensor) -> Tensor:
        if max(view.shape[-2:]) > LARGEST_PIXEL_SIDE:
            view = F.adaptive_avg_pool2d(view, LARGEST_PIXEL_SIDE)
        return view.flatten(1)


def with_progress(items: Iterable[Item], what: str, progress: bool) -> Iterable[Item]:
    """The items one by one; with `progress`, and on a terminal, under a bar on standard error.

    >>> list(with_progress([1, 2], "features", progress=False))
    [1, 2]
    """
    console = Console(stderr=True)
    if progress and console.is_terminal:
        return track(items, what, console=console, transient=True)
    return items


def gathered(mine: Item) -> list[Item]:
    """What every rank has, in the order of the ranks; only `mine` where there is one process."""
    if world_group() is None:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def is_first_rank() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return world_group() is None or dist.get_rank() == 0


def on_first_rank(measure: Callable[[], Found]) -> Found:
    """Measure on rank 0; every rank waits for what it found, as long as the process group's timeout allows,
    and returns it or raises its error.
    """
    outcome: Any = None
    if is_first_rank():
        try:
            outcome = measure()
        except Exception as error:
            outcome = error
    outcome, *_ = gathered(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _forward(encoder: nn.Module, view: Tensor, device: torch.device | str) -> Tensor:
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


def _require_each_once(index: Tensor) -> None:
    repeated = index[1:][index[1:] == index[:-1]]
    if len(repeated):
        raise ValueError(
            f"The loader yields {len(repeated)} images more than once (first: image {int(repeated[0])}); an "
            "evaluation loader covers each image exactly once. With several ranks, give each rank its own "
            "shard."
        )
