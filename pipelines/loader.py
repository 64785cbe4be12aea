"""`build` joins images, views, an engine and the sampler into a `Loader`, which is iterated epoch by epoch."""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgessl.kernels.collectives import to_device
from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engines.protocol import Engine, Request, Shown
from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sampler import Sampling
from fastgessl.pipelines.sources.images import ArrayImages, Images
from fastgessl.pipelines.specs import ViewSpec

GIB = 1 << 30
ENGINES = ("resident", "dali", "torchvision")
REQUIRES = {"dali": "nvidia.dali", "torchvision": "torchvision"}
# 224-pixel views of 32-pixel images are common, 7 times; beyond 8 times the size is a slip.
MAX_ENLARGEMENT = 8


@dataclass(frozen=True)
class Batch:
    """B images of one rank, as V views each."""

    views: list[Tensor]
    """V tensors (B, 3, S, S) float32, channels_last, normalised; S is a view's own size."""
    index: Tensor
    """(B,) int64, places in the data set. Where a bad file was skipped, the image that stands in for it."""
    label: Tensor | None
    """(B,) int64; None without labels."""


class Loader:
    """Batches of views, one epoch for each `for` loop.

    In training the images come in a new order each epoch and the last partial global batch is dropped; a loop
    that is left early is continued by the next one, as after a resume, and the engine reads ahead from one
    epoch into the next. In evaluation every loop shows every image once, in order, with the same draws.
    """

    def __init__(
        self,
        images: Images,
        engine: Engine,
        sampling: Sampling,
        bad_files: BadFiles,
        device: torch.device,
        engine_name: str,
    ) -> None:
        self._engine, self._sampling, self._bad_files, self._device = engine, sampling, bad_files, device
        self._labels = None if images.labels is None else torch.from_numpy(images.labels)
        self._epoch, self._iteration = 0, 0
        self._stream: Generator[Shown] | None = None
        self.engine_name = engine_name

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        count = self._sampling.batches
        return count if len(self._sampling.indices(0, count - 1)) else count - 1

    @property
    def epoch(self) -> int:
        """The epoch that the present `for` loop runs, or that the next one will."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        if not self._sampling.training:
            self._go_to(0, 0)
        elif self._iteration == len(self):
            self._epoch, self._iteration = self._epoch + 1, 0
        while self._iteration < len(self):
            shown = self._next()
            self._iteration += 1
            self._bad_files.announce()
            if shown.views:
                index = torch.from_numpy(shown.images.copy())
                label = None if self._labels is None else to_device(self._labels[index], self._device)
                yield Batch(shown.views, to_device(index, self._device), label)
        if self._sampling.training:
            self._epoch, self._iteration = self._epoch + 1, 0
        else:
            self._go_to(1, 0)

    def _next(self) -> Shown:
        """The batch that the loader stands before."""
        if self._stream is None:
            self._stream = self._engine.views(
                _requests(self._sampling, len(self), self._epoch, self._iteration)
            )
            # Also at the interpreter's exit, before torch takes apart what its workers are told to stop with:
            # it would wait 5 s for them.
            self._stop_stream = weakref.finalize(self, self._stream.close)
        try:
            return next(self._stream)
        except BaseException:
            self._go_to(self._epoch, self._iteration)
            raise

    def _go_to(self, epoch: int, iteration: int) -> None:
        if self._stream is not None:
            self._stop_stream()
        self._epoch, self._iteration, self._stream = epoch, iteration, None

    @property
    def bad_files(self) -> list[str]:
        """Names of the bad files that this rank has skipped so far."""
        return self._bad_files.names()

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: the batches yielded so far are done. It fits a loader on any number of
        ranks.
        """
        done = self._iteration == len(self)
        return {
            "epoch": self._epoch + done,
            "iteration": 0 if done else self._iteration,
            "seed": self._sampling.seed,
            "batch_size": self._sampling.batch_size,
            "images": self._sampling.size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises DataError if seed, global batch size or number of images
        differ from those of the state.
        """
        for name, here in (
            ("seed", self._sampling.seed),
            ("batch_size", self._sampling.batch_size),
            ("images", self._sampling.size),
        ):
            if state[name] != here:
                raise DataError(
                    f"the saved loader had {name} {state[name]}, this one has {here}. Resume with the same "
                    "data, batch size and seed."
                )
        self._go_to(state["epoch"], state["iteration"])

    def close(self) -> None:
        """Let go of the engine's threads, processes and device memory."""
        self._go_to(self._epoch, self._iteration)
        self._engine.close()


def _requests(sampling: Sampling, steps: int, epoch: int, iteration: int) -> Iterator[Request]:
    """What is asked of the engine from there on: in training without an end, so that it is never idle between
    two epochs.
    """
    for later in itertools.count(epoch) if sampling.training else (epoch,):
        for step in range(iteration if later == epoch else 0, steps):
            yield Request(sampling.indices(later, step), later)


def choose_engine(
    images: Images, engine: str = "auto", device: str | torch.device = "cpu", resident_limit: float = 16.0
) -> tuple[str, str]:
    """The engine that `build` will use, and the reason in a sentence. Raises DataError if `engine` cannot do
    it.

    >>> import numpy as np
    >>> images = ArrayImages(np.zeros((10, 8, 8, 3), dtype=np.uint8))
    >>> choose_engine(images)[0]
    'resident'
    """
    if engine not in ("auto", *ENGINES):
        raise DataError(f"data.engine {engine!r} is unknown. Choose auto, {', '.join(ENGINES)}.")
    if isinstance(images, ArrayImages):
        gib = images.images.nbytes / GIB
        held = f"{len(images)} images take {gib:.3g} GiB"
        if engine == "auto" and gib <= resident_limit:
            return (
                "resident",
                f"{held} of {torch.device(device).type} memory, within data.resident_limit "
                f"{resident_limit:g} GiB",
            )
        if engine == "resident" and gib > resident_limit:
            raise DataError(
                f"{held}, more than data.resident_limit {resident_limit:g} GiB. Raise the limit, or use "
                "data.engine auto."
            )
        why = f"{held}, more than data.resident_limit {resident_limit:g} GiB"
    else:
        if engine == "resident":
            raise DataError(
                "data.engine resident needs an array data set, found image files. Use dali, or pack the "
                "images into an .npz."
            )
        why = f"{len(images)} image files are decoded as they are needed"
    if engine != "auto":
        return engine, "asked for"
    missing = _missing("nvidia.dali")
    return ("torchvision", f"{why}; DALI does not import ({missing})") if missing else ("dali", why)


def build(
    images: Images,
    views: Sequence[ViewSpec],
    *,
    batch_size: int,
    engine: str = "auto",
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    training: bool = True,
    workers: int = 2,
    resident_limit: float = 16.0,
    bad_files: str = "error",
    bad_list: Path | None = None,
) -> Loader:
    """A loader of `views` of `images`.

    `batch_size` counts the images of all `world_size` ranks; rank r gets the r-th part of every global batch.
    `workers` threads (dali) or processes (torchvision) decode; arrays of up to `resident_limit` GiB are kept
    on `device`. What is drawn depends on `seed`, epoch, image and view alone. An image that cannot be decoded
    raises DataError in its batch ("error"), or is left out of evaluation and has the next one in its place in
    training ("skip"), and is listed in the file `bad_list`. Raises DataError if the batch cannot be dealt out
    or filled, if the views do not fit the images, or if the engine cannot be had.

    >>> import numpy as np
    >>> images = ArrayImages(np.zeros((10, 8, 8, 3), dtype=np.uint8))
    >>> loader = build(images, [ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), repeat=2)], batch_size=4)
    >>> [len(batch.views) for batch in loader]
    [2, 2]
    """
    if bad_files not in ("error", "skip"):
        raise DataError(f"data.bad_files must be error or skip, found {bad_files!r}.")
    sampling = Sampling(len(images), batch_size, seed, rank, world_size, training)
    specs = tuple(spec for spec in views for _ in range(spec.repeat))
    _check_views(images, specs)
    name, _ = choose_engine(images, engine, device, resident_limit)
    if name != "dali" and any(spec.color == "yiq" for spec in specs):
        raise DataError(
            f"views.color yiq is DALI's, and the engine is {name}. Use data.engine dali, or views.color "
            "torchvision."
        )
    if name != "resident" and (missing := _missing(REQUIRES[name])):
        raise DataError(
            f"data.engine {name} does not import ({missing}). Install fastgessl[train], or use data.engine "
            "auto."
        )
    device = torch.device(device)
    module = importlib.import_module(f"fastgessl.pipelines.engines.{name}")
    bad = BadFiles(images, skip=bad_files == "skip", training=training, listing=bad_list)
    made = module.make_engine(
        images, Draws(specs, seed), bad, batch_size=batch_size // world_size, device=device, workers=workers
    )
    return Loader(images, made, sampling, bad, device, name)


def _check_views(images: Images, specs: Sequence[ViewSpec]) -> None:
    if not specs:
        raise DataError("views: no view is asked for. Give at least one ViewSpec.")
    if isinstance(images, ArrayImages):
        largest, long_side = max(spec.size for spec in specs), max(images.images.shape[1:3])
        if largest > MAX_ENLARGEMENT * long_side:
            raise DataError(
                f"views.size {largest} is more than {MAX_ENLARGEMENT} times the images' {long_side} pixels. "
                f"Choose at most {MAX_ENLARGEMENT * long_side}."
            )


def _missing(module: str) -> str:
    """Why `module` does not import; empty if it does."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return ""
