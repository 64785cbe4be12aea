"""`build` joins images, views and an engine into a `Loader`, which is iterated epoch by epoch.

Which images a rank sees at an iteration is a pure function (`Sampling`), so that a run resumes exactly, on
any number of ranks: a global batch is `batch_size` consecutive places in the epoch's order, and rank r takes
the r-th of its `world_size` equal parts.
"""

import importlib
import itertools
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgessl.kernels.collectives import to_device
from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.draws import Draws, epoch_order
from fastgessl.pipelines.engines import Engine, Made, Request, Setup
from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import ArrayImages, Images
from fastgessl.pipelines.views import ViewSpec

GIB = 1 << 30
# Name, also of the engine's file: its class, and the package that it needs.
ENGINES = {
    "resident": ("ResidentEngine", "torch"),
    "dali": ("DaliEngine", "nvidia.dali"),
    "torchvision": ("TorchvisionEngine", "torchvision"),
}
# 224-pixel views of 32-pixel images are common, 7 times; beyond 8 times the size is a slip.
MAX_ENLARGEMENT = 8


@dataclass(frozen=True)
class Sampling:
    """How a data set of `size` images is dealt out; raises DataError if it cannot be.

    Training: in the epoch's order, without the last partial global batch, so that no image comes twice.
    Evaluation: in the order of the data set; the last global batch is dealt out as evenly as it goes, and a
    rank may get one image fewer, or none.

    >>> ranks = [Sampling(10, 4, seed=0, rank=rank, world_size=2, training=False) for rank in (0, 1)]
    >>> [sampling.indices(epoch=0, iteration=2).tolist() for sampling in ranks]
    [[8], [9]]
    """

    size: int
    batch_size: int
    """Images of a global batch, over all ranks."""
    seed: int
    rank: int
    world_size: int
    training: bool

    def __post_init__(self) -> None:
        if self.size == 0:
            raise DataError("the data set holds no images. Add images, or name another data set.")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise DataError(
                f"rank must be from 0 to world_size - 1, found rank {self.rank} of {self.world_size}."
            )
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise DataError(
                f"batch size {self.batch_size} is no positive multiple of the {self.world_size} processes. "
                "Choose a multiple."
            )
        if self.training and self.batch_size > self.size:
            raise DataError(
                f"batch size {self.batch_size} is larger than the data set of {self.size} images. Choose at "
                f"most {self.size}."
            )

    @property
    def batches(self) -> int:
        """Global batches of an epoch: whole ones in training; in evaluation also the last, partial one."""
        return self.size // self.batch_size if self.training else -(-self.size // self.batch_size)

    def indices(self, epoch: int, iteration: int) -> NDArray[np.int64]:
        """This rank's images of global batch `iteration` of `epoch`: (batch_size / world_size,) int64, fewer
        in a partial batch.
        """
        start = iteration * self.batch_size
        count = min(self.batch_size, self.size - start)
        first = start + count * self.rank // self.world_size
        end = start + count * (self.rank + 1) // self.world_size
        if self.training:
            return epoch_order(self.size, self.seed, epoch)[first:end]
        return np.arange(first, end)

    def requests(self, steps: int, epoch: int, iteration: int) -> Iterator[Request]:
        """What is asked of the engine from there on: in training without an end, so that it is never idle
        between two epochs.
        """
        for later in itertools.count(epoch) if self.training else (epoch,):
            for step in range(iteration if later == epoch else 0, steps):
                yield Request(self.indices(later, step), later)


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

    def __init__(self, engine_name: str, engine: Engine, setup: Setup, sampling: Sampling) -> None:
        self.engine_name = engine_name
        self._engine, self._sampling = engine, sampling
        self._bad_files, self._device = setup.bad_files, setup.device
        labels = setup.images.labels
        self._labels = None if labels is None else torch.from_numpy(labels)
        self._epoch, self._iteration = 0, 0
        self._stream: Generator[Made] | None = None
        # The last global batch of an evaluation may have no image for this rank.
        last_is_empty = not sampling.training and not len(sampling.indices(0, sampling.batches - 1))
        self._batches = sampling.batches - last_is_empty

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return self._batches

    @property
    def epoch(self) -> int:
        """The epoch that the present `for` loop runs, or that the next one will."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        if not self._sampling.training:
            self._go_to(0, 0)
        elif self._iteration == self._batches:
            self._epoch, self._iteration = self._epoch + 1, 0
        while self._iteration < self._batches:
            if self._stream is None:
                requests = self._sampling.requests(self._batches, self._epoch, self._iteration)
                self._stream = self._engine.views(requests)
                # Also at the interpreter's exit, before torch takes apart what its workers are told to stop
                # with: it would wait 5 s for them.
                self._stop_stream = weakref.finalize(self, self._stream.close)
            try:
                made = next(self._stream)
            except BaseException:
                self._go_to(self._epoch, self._iteration)
                raise
            self._iteration += 1
            if self._bad_files.found:
                self._bad_files.announce()
            if made.views:
                index = torch.from_numpy(made.index.copy())
                label = None if self._labels is None else to_device(self._labels[index], self._device)
                yield Batch(made.views, to_device(index, self._device), label)
        if self._sampling.training:
            self._epoch, self._iteration = self._epoch + 1, 0
        else:
            self._go_to(1, 0)

    def _go_to(self, epoch: int, iteration: int) -> None:
        if self._stream is not None:
            self._stop_stream()
        self._epoch, self._iteration, self._stream = epoch, iteration, None

    @property
    def bad_files(self) -> list[str]:
        """Names of the bad files that this rank has skipped so far."""
        return self._bad_files.names()

    def state_dict(self) -> dict[str, int]:
        """The loader's position: the batches yielded so far are done. It fits any number of ranks."""
        done = self._iteration == self._batches
        return {
            "epoch": self._epoch + done,
            "iteration": 0 if done else self._iteration,
            "seed": self._sampling.seed,
            "batch_size": self._sampling.batch_size,
            "images": self._sampling.size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. Raises DataError if seed, global batch size or number of images
        differ from those of the state.
        """
        for name, here in self.state_dict().items():
            if name not in ("epoch", "iteration") and state[name] != here:
                raise DataError(
                    f"the saved loader had {name} {state[name]}, this one has {here}. Resume with the same "
                    "data, batch size and seed."
                )
        self._go_to(state["epoch"], state["iteration"])

    def close(self) -> None:
        """Release the engine's threads, processes and device memory."""
        self._go_to(self._epoch, self._iteration)
        self._engine.close()


def choose_engine(
    images: Images, engine: str = "auto", device: str | torch.device = "cpu", resident_limit: float = 16.0
) -> tuple[str, str]:
    """The engine that `build` uses, and why, in a sentence. Raises DataError if `engine` cannot be used.

    >>> import numpy as np
    >>> images = ArrayImages(np.zeros((10, 8, 8, 3), dtype=np.uint8))
    >>> choose_engine(images)[0]
    'resident'
    """
    if engine not in ("auto", *ENGINES):
        raise DataError(f"data.engine {engine!r} is unknown. Choose auto, {', '.join(ENGINES)}.")
    if isinstance(images, ArrayImages):
        gib = images.images.nbytes / GIB
        held, limit = (
            f"{len(images)} images take {gib:.3g} GiB",
            f"data.resident_limit {resident_limit:g} GiB",
        )
        if engine == "auto" and gib <= resident_limit:
            return "resident", f"{held} of {torch.device(device).type} memory, within {limit}"
        why = f"{held}, more than {limit}"
        if engine == "resident" and gib > resident_limit:
            raise DataError(f"{why}. Raise the limit, or use data.engine auto.")
    else:
        why = f"{len(images)} image files are decoded as they are needed"
        if engine == "resident":
            raise DataError(
                "data.engine resident needs an array data set, found image files. Use dali, or pack the "
                "images into an .npz."
            )
    if engine != "auto":
        return engine, "asked for"
    missing = _missing("dali")
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
    >>> view = ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), repeat=2)
    >>> loader = build(images, [view], batch_size=4)
    >>> [len(batch.views) for batch in loader]
    [2, 2]
    """
    if bad_files not in ("error", "skip"):
        raise DataError(f"data.bad_files must be error or skip, found {bad_files!r}.")
    sampling = Sampling(len(images), batch_size, seed, rank, world_size, training)
    specs = tuple(spec for spec in views for _ in range(spec.repeat))
    if not specs:
        raise DataError("views: no view is asked for. Give at least one ViewSpec.")
    if isinstance(images, ArrayImages):
        largest, most = max(spec.size for spec in specs), MAX_ENLARGEMENT * max(images.images.shape[1:3])
        if largest > most:
            raise DataError(
                f"views.size {largest} is more than {MAX_ENLARGEMENT} times the images' "
                f"{most // MAX_ENLARGEMENT} pixels. Choose at most {most}."
            )
    name, _ = choose_engine(images, engine, device, resident_limit)
    if name != "dali" and any(spec.color == "yiq" for spec in specs):
        raise DataError(
            f"views.color yiq is DALI's, and the engine is {name}. Use data.engine dali, or views.color "
            "torchvision."
        )
    if missing := _missing(name):
        raise DataError(
            f"data.engine {name} does not import ({missing}). Install fastgessl[train], or use data.engine "
            "auto."
        )
    bad = BadFiles(images, skip=bad_files == "skip", training=training, listing=bad_list)
    draws = Draws(specs, seed)
    setup = Setup(images, draws, bad, batch_size // world_size, torch.device(device), workers)
    module = importlib.import_module(f"fastgessl.pipelines.engines.{name}")
    return Loader(name, getattr(module, ENGINES[name][0])(setup), setup, sampling)


def _missing(engine: str) -> str:
    """Why what `engine` needs does not import; empty if it does."""
    try:
        importlib.import_module(ENGINES[engine][1])
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return ""
