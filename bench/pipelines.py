"""Engines side by side: `python -m bench.pipelines [--photos FOLDER] [--device cuda] [--out DIR]`.

Each row is one data set, recipe and engine: source images a second, and CPU milliseconds an image over this process and its workers.
Engines take turns, so that a busy machine slows all of them alike; the median of the rounds is printed. A second table has the mean and
the largest difference of one batch of the same draws to the torchvision engine, grey levels of 255; at the edge are the outermost pixels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench import results
from fastgessl import pipelines
from fastgessl.pipelines import ArrayImages, Loader
from fastgessl.pipelines.images import Images

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Row:
    data: str
    views: str
    engine: str
    images_per_second: float
    cpu_ms_per_image: float
    """On Linux a worker's time counts when it has ended, which torchvision's workers do with their epoch."""


@dataclass(frozen=True)
class Difference:
    data: str
    views: str
    engine: str
    mean: float
    largest_inside: float
    largest_at_edge: float


@dataclass(frozen=True)
class Case:
    data: str
    views: str
    images: Images
    size: int
    preset: str
    engines: tuple[str, ...]
    batch_size: int


def cases(photos: Path | None) -> Iterator[Case]:
    arrays = ("resident", "torchvision")
    digits = pipelines.open_images("digits")
    assert digits is not None
    yield Case("digits", "simclr 2x16", digits, 16, "simclr", arrays, 256)
    noise = ArrayImages(np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8))
    yield Case("noise 32x32", "simclr 2x32", noise, 32, "simclr", (*arrays, "dali"), 256)
    if photos is not None:
        images = pipelines.open_images("folder", photos)
        assert images is not None
        for preset, name in (("simclr", "simclr 2x224"), ("dino", "dino 2x224 + 8x96")):
            yield Case(photos.name, name, images, 224, preset, ("dali", "torchvision"), 32)


def measure(case: Case, device: str, workers: int, rounds: int) -> list[Row]:
    views = pipelines.view_preset(case.preset, case.size, mean=HALF, std=HALF)
    loaders = {
        engine: pipelines.build(case.images, views, batch_size=case.batch_size, engine=engine, device=device, workers=workers)
        for engine in case.engines
    }
    # The first round is not counted: threads start and files come into the cache.
    turns = [{engine: epoch(loader, case.batch_size, device) for engine, loader in loaders.items()} for _ in range(rounds + 1)][1:]
    rows = []
    for engine in loaders:
        wall, cpu = (statistics.median(values) for values in zip(*(turn[engine] for turn in turns), strict=True))
        rows.append(Row(case.data, case.views, engine, 1 / wall, cpu * 1e3))
        loaders[engine].close()
    return rows


def differences(case: Case, device: str) -> list[Difference]:
    """One batch by every engine against torchvision's: (V, B, 3, S, S) of the full-size views."""
    views = pipelines.view_preset(case.preset, case.size, mean=HALF, std=HALF)
    shown = {}
    for engine in case.engines:
        loader = pipelines.build(case.images, views, batch_size=case.batch_size, engine=engine, device=device, training=False)
        shown[engine] = torch.stack([view.cpu() for view in next(iter(loader)).views if view.shape[-1] == case.size])
        loader.close()
    found = []
    for engine, pixels in shown.items():
        if engine != "torchvision":
            gap = (pixels - shown["torchvision"]).abs() * 127.5
            inside = gap[..., 1:-1, 1:-1].max().item()
            edge = max(gap[..., [0, -1], :].max().item(), gap[..., [0, -1]].max().item())
            found.append(Difference(case.data, case.views, engine, gap.mean().item(), inside, edge))
    return found


def epoch(loader: Loader, batch_size: int, device: str) -> tuple[float, float]:
    """Seconds on the clock and on the CPU, an image."""
    clock, before = time.perf_counter(), os.times()
    for _ in loader:
        pass
    if device != "cpu":
        torch.cuda.synchronize()
    after, count = os.times(), len(loader) * batch_size
    return (time.perf_counter() - clock) / count, (sum(after[:4]) - sum(before[:4])) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photos for the rows that decode files")
    parser.add_argument("--device", default="cpu", help="where views are made")
    parser.add_argument("--workers", type=int, default=2, help="threads (dali) or processes (torchvision)")
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs of each engine")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    options = parser.parse_args()
    load = os.getloadavg()
    measured = list(cases(options.photos))
    rows = [row for case in measured for row in measure(case, options.device, options.workers, options.rounds)]
    gaps = [gap for case in measured for gap in differences(case, options.device)]
    print(f"{'data':28s} {'views':20s} {'engine':12s} {'images/s':>10s} {'CPU ms/image':>13s}")
    for row in rows:
        print(f"{row.data:28s} {row.views:20s} {row.engine:12s} {row.images_per_second:10.0f} {row.cpu_ms_per_image:13.3f}")
    print(f"\n{'data':28s} {'views':20s} {'engine':12s} {'mean':>8s} {'inside':>8s} {'edge':>8s}")
    for gap in gaps:
        print(f"{gap.data:28s} {gap.views:20s} {gap.engine:12s} {gap.mean:8.2f} {gap.largest_inside:8.1f} {gap.largest_at_edge:8.1f}")
    settings = {"device": options.device, "workers": options.workers, "rounds": options.rounds, "load_average_at_start": load}
    tables = {"rows": [asdict(row) for row in rows], "differences": [asdict(gap) for gap in gaps]}
    print(results.write("pipelines", settings | tables, options.out))


if __name__ == "__main__":
    main()
