"""Engines side by side: `python -m bench.pipelines [--photos FOLDER] [--cifar10 FILE.npz] [--device cuda]
[--out DIR]`.

Each row is one data set, recipe and engine: source images a second, and CPU milliseconds an image over this
process and its workers. Engines take turns, so that a busy machine slows all of them alike; the median of the
rounds is printed. A second table says where the DALI engine's CPU time goes, a third what other ways of
decoding would cost (`bench/decoding.py`). Then the mean and the largest difference of one batch of the same
draws, grey levels of 255: to the torchvision engine (at the edge are the outermost pixels), and of DALI's own
colours (`dali yiq`) to exact ones, by channel. `gpu_rows` is what `bench.gpu` measures of the engines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import results, view_differences
from bench.timing import wait
from fastgessl import pipelines
from fastgessl.kernels import augment_views, colour_views
from fastgessl.pipelines import ArrayImages, FileImages, Loader, ViewSpec
from fastgessl.pipelines.decode import image_size
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.sources.images import EncodedImages, Images

HALF = (0.5, 0.5, 0.5)
MOST_PHOTOS = 200


@dataclass(frozen=True)
class Row:
    data: str
    views: str
    engine: str
    images_per_second: float
    cpu_ms_per_image: float


@dataclass(frozen=True)
class Part:
    data: str
    views: str
    part: str
    cpu_ms_per_image: float


@dataclass(frozen=True)
class Case:
    data: str
    views: str
    images: Images
    specs: tuple[ViewSpec, ...]
    engines: tuple[str, ...]
    """`dali yiq` is the dali engine with colours of its own."""
    batch_size: int

    def loader(self, engine: str, device: str, workers: int = 2) -> Loader:
        """Every image once."""
        name, _, color = engine.partition(" ")
        specs = [replace(spec, color=color or "torchvision") for spec in self.specs]
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "device": device,
            "workers": workers,
            "training": False,
        }
        return pipelines.build(self.images, specs, engine=name, **options)


def cases(photos: Sequence[Path], cifar10: Path | None) -> Iterator[Case]:
    arrays = ("resident", "dali", "torchvision")
    digits = pipelines.open_images("digits")
    assert digits is not None
    yield Case("digits", "simclr 2x16", digits, _specs("simclr", 16), ("resident", "torchvision"), 256)
    if cifar10 is None:
        small = ArrayImages(np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8))
        yield Case("noise 32x32", "simclr 2x32", small, _specs("simclr", 32), arrays, 256)
    else:
        images = pipelines.open_images("npz", cifar10)
        assert isinstance(images, ArrayImages)
        yield Case(
            "cifar10", "simclr 2x32", ArrayImages(images.images[:2048]), _specs("simclr", 32), arrays, 256
        )
    for folder in photos:
        files = _some(pipelines.open_images("folder", folder))
        for name, specs in (
            ("simclr 2x224", _specs("simclr", 224)),
            ("dino 2x224 + 6x96", _specs("dino", 224, local_views=6)),
        ):
            yield Case(folder.name, name, files, specs, ("dali", "dali yiq", "torchvision"), 32)


def _specs(preset: str, size: int, local_views: int = 0) -> tuple[ViewSpec, ...]:
    return pipelines.view_preset(preset, size, mean=HALF, std=HALF, local_views=local_views)


def _some(files: Images | None) -> FileImages:
    """Evenly spread over the folder, so that torchvision takes half a minute an epoch."""
    assert isinstance(files, FileImages)
    return FileImages(files.paths[:: -(-len(files) // MOST_PHOTOS)])


def measure(case: Case, device: str, workers: int, rounds: int) -> list[Row]:
    loaders = {engine: case.loader(engine, device, workers) for engine in case.engines}
    # The first round is not counted: files come into the cache.
    turns = [
        {engine: epoch(loader, len(case.images)) for engine, loader in loaders.items()}
        for _ in range(rounds + 1)
    ][1:]
    rows = []
    for engine in loaders:
        clock, cpu = (
            statistics.median(values) for values in zip(*(turn[engine] for turn in turns), strict=True)
        )
        rows.append(Row(case.data, case.views, engine, 1 / clock, cpu * 1e3))
    return rows


def epoch(loader: Loader, count: int) -> tuple[float, float]:
    """Seconds on the clock and on the CPU, an image. A worker's time counts when it has ended, as in
    evaluation it does with the loop.
    """
    clock, before = time.perf_counter(), os.times()
    for _ in loader:
        pass
    wait()
    clock, after = time.perf_counter() - clock, os.times()
    return clock / count, (sum(after[:4]) - sum(before[:4])) / count


def breakdown(case: Case, workers: int) -> Iterator[Part]:
    """CPU milliseconds an image of the DALI engine's parts; what they leave of the whole is DALI's: decode,
    crop, resize, flip.
    """
    images = case.images
    assert not isinstance(images, ArrayImages)
    numbers = np.arange(min(len(images), 64))
    read, encoded = _cpu(lambda: [images.read(int(number)) for number in numbers])
    header, sizes = _cpu(lambda: [image_size(content, "") for content in encoded])
    height, width = np.array(sizes).T
    draw, drawn = _cpu(lambda: Draws(case.specs, 0)(numbers, height, width, 0))

    def colour() -> None:
        for spec, parameters, view in zip(case.specs, drawn, bytes_of_views, strict=True):
            colour_views(view, parameters, mean=spec.mean, std=spec.std, blur_kernel=spec.blur_kernel)

    bytes_of_views = [
        torch.randint(0, 256, (len(numbers), spec.size, spec.size, 3), dtype=torch.uint8)
        for spec in case.specs
    ]
    colours, _ = _cpu(colour)
    loader = case.loader("dali", "cpu", workers)
    whole = min(epoch(loader, len(images))[1] for _ in range(2)) * 1e3
    parts = {"read": read, "header": header, "draws": draw, "colour and blur": colours}
    parts = {name: seconds / len(numbers) * 1e3 for name, seconds in parts.items()}
    parts |= {"decode, crop, resize, flip": whole - sum(parts.values()), "whole": whole}
    for name, milliseconds in parts.items():
        yield Part(case.data, case.views, name, milliseconds)


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process for `work`, the smaller of two, and what it gave."""
    taken = []
    for _ in range(2):
        before = time.process_time()
        value = work()
        taken.append(time.process_time() - before)
    return min(taken), value


def gpu_rows(
    photos: Path | None, seconds: float, *, tiny: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows for `bench.gpu`, the most valuable first, until `seconds` are over: (name, row).

    views a second of the fused kernels beside batched PyTorch on the same device, on CIFAR-sized and on
    224-pixel bytes; then whole engines: `resident`, and DALI with nvJPEG beside torchvision on `photos`.
    `tiny` takes seconds on a CPU.
    """
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    implementations = ("triton", "chunked") if device == "cuda" else ("chunked",)
    shapes = [(4, 32)] if tiny else [(256, 32), (1024, 32), (4096, 32), (1024, 96)]
    for count, size in shapes:
        for implementation in implementations:
            yield (
                f"augment_views {count}x{size}, {implementation}",
                _view_row(count, size, device, implementation),
            )
    for count, size in [(2, 64)] if tiny else [(256, 224)]:
        for implementation in implementations:
            yield (
                f"colour_views {count}x{size}, {implementation}",
                _colour_row(count, size, device, implementation),
            )
    pixels = np.random.default_rng(0).integers(0, 256, (64 if tiny else 50_000, 32, 32, 3), dtype=np.uint8)
    yield from _engine_row(
        "32x32 2x32", ArrayImages(pixels), _specs("simclr", 32), "resident", device, 32 if tiny else 1024, 2
    )
    if photos is None:
        yield "files", {"absent": "photos: give them with --photos FOLDER"}
        return
    files = pipelines.open_images("folder", photos)
    assert files is not None
    workers = 2 if tiny else min(os.cpu_count() or 2, 16)
    for name, specs in (
        ("2x224", _specs("simclr", 224)),
        ("2x224 + 6x96", _specs("dino", 224, local_views=6)),
    ):
        for engine in ("dali", "torchvision"):
            if time.perf_counter() - started > seconds:
                return
            yield from _engine_row(
                f"{photos.name} {name}", files, specs, engine, device, min(64, len(files)), workers
            )


def _view_row(count: int, size: int, device: str, implementation: str) -> dict[str, Any]:
    (spec, *_) = _specs("simclr", size)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
    (drawn,) = Draws((spec,), 0)(np.arange(count), np.full(count, size), np.full(count, size), 0)
    options: dict[str, Any] = {
        "size": size,
        "mean": HALF,
        "std": HALF,
        "blur_kernel": spec.blur_kernel,
        "implementation": implementation,
    }
    return _rate(lambda: augment_views(images, drawn, **options), count, "views_per_second")


def _colour_row(count: int, size: int, device: str, implementation: str) -> dict[str, Any]:
    (spec, *_) = _specs("simclr", size)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
    (drawn,) = Draws((spec,), 0)(np.arange(count), np.full(count, size), np.full(count, size), 0)
    options: dict[str, Any] = {
        "mean": HALF,
        "std": HALF,
        "blur_kernel": spec.blur_kernel,
        "implementation": implementation,
    }
    return _rate(lambda: colour_views(images, drawn, **options), count, "views_per_second")


def _rate(work: Callable[[], object], count: int, unit: str) -> dict[str, Any]:
    samples = []
    for _ in range(13):
        wait()
        before = time.perf_counter()
        work()
        wait()
        samples.append(time.perf_counter() - before)
    return {unit: count / statistics.median(samples[3:]), "samples": samples[3:]}


def _engine_row(
    name: str,
    images: Images,
    specs: tuple[ViewSpec, ...],
    engine: str,
    device: str,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Source images a second of an engine at its own pace, nothing else running; a row that says so where it
    does not import.
    """
    try:
        loader = pipelines.build(
            images,
            specs,
            batch_size=batch_size,
            engine=engine,
            device=device,
            workers=workers,
            training=False,
        )
    except pipelines.DataError as error:
        yield f"{name}, {engine}", {"absent": str(error)}
        return
    samples = [epoch(loader, len(images)) for _ in range(3)]
    clock, cpu = samples[-1]
    yield (
        f"{name}, {engine}",
        {
            "images_per_second": 1 / clock,
            "cpu_ms_per_image": cpu * 1e3,
            "samples": [1 / turn[0] for turn in samples],
        },
    )


def first_batches(case: Case, device: str) -> dict[str, Tensor]:
    """The same batch by every engine: (V, B, 3, S, S) of the full-size views."""
    shown = {}
    for engine in case.engines:
        loader = case.loader(engine, device)
        shown[engine] = torch.stack(
            [view.cpu() for view in next(iter(loader)).views if view.shape[-1] == case.specs[0].size]
        )
        loader.close()
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--photos", type=Path, nargs="+", default=[], help="folders of photos for the rows that decode files"
    )
    parser.add_argument("--cifar10", type=Path, help="an .npz with CIFAR-10 in train_x, instead of noise")
    parser.add_argument("--device", default="cpu", help="where views are made")
    parser.add_argument("--workers", type=int, default=2, help="threads (dali) or processes (torchvision)")
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs of each engine")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    options = parser.parse_args()
    load = os.getloadavg()
    measured = list(cases(options.photos, options.cifar10))
    tables: dict[str, list[Any]] = {
        name: [] for name in ("rows", "differences", "yiq_differences", "decoding", "dali_cpu_ms_per_image")
    }
    for case in measured:
        tables["rows"] += measure(case, options.device, options.workers, options.rounds)
        shown = first_batches(case, options.device)
        tables["differences"] += view_differences.to_torchvision(case.data, case.views, shown)
        tables["yiq_differences"] += view_differences.of_yiq(case.data, case.views, shown)
        if isinstance(case.images, EncodedImages):
            from bench import decoding  # imports DALI, which the GPU program may do without

            tables["decoding"] += decoding.rows(
                case.data, case.views, case.images, case.specs, options.rounds
            )
            tables["dali_cpu_ms_per_image"] += breakdown(case, options.workers)
    settings = {
        "device": options.device,
        "workers": options.workers,
        "rounds": options.rounds,
        "load_average_at_start": load,
    }
    written = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
    for name, rows in written.items():
        print_table(name, rows)
    print(
        results.write(
            "pipelines" if options.photos and options.cifar10 else "pipelines-part",
            settings | written,
            options.out,
        )
    )


def print_table(name: str, rows: list[dict[str, Any]]) -> None:
    """Columns are the fields of the rows."""
    if not rows:
        return
    lines = [
        list(rows[0]),
        *([f"{value:.3f}" if isinstance(value, float) else value for value in row.values()] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{name}")
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
