"""How many images do the engines make into views, what do kernels of views take, how far are they apart?

Engines take turns over whole epochs; the resident engine on arrays, DALI and torchvision on files (`--photos
FOLDER`) too. Differences are between first batches of the same draws, in gray levels of 255.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch

from fastgessl import pipelines
from fastgessl.kernels import augment_views, color_views
from fastgessl.pipelines import ArrayImages, FileImages, Loader
from fastgessl.pipelines.draws import Draws

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
GRAY_LEVELS = 127.5
"""Of a unit, where views are normalized by a mean and standard deviation of a half."""
CASES = {
    "digits, simclr 2x16": ("simclr", 16, 0, ("resident", "torchvision")),
    "32x32, simclr 2x32": ("simclr", 32, 0, ("resident", "dali", "torchvision")),
    "photos, simclr 2x224": ("simclr", 224, 0, ("dali", "dali yiq", "torchvision")),
    "photos, dino 2x224 + 6x96": ("dino", 224, 6, ("dali", "dali yiq", "torchvision")),
}
"""Preset, size, local views, engines; `dali yiq` is the dali engine with colors of its own."""


class Epoch:
    """One engine's pass over the images; keeps CPU seconds of this process and its workers per pass."""

    def __init__(self, loader: Callable[[], Loader]) -> None:
        self.make, self.cpu = loader, []
        self.loader: Loader | None = None

    def __call__(self) -> None:
        self.loader = self.loader or self.make()
        before = os.times()
        for _ in self.loader:
            pass
        self.cpu.append(sum(os.times()[:4]) - sum(before[:4]))


# CPU time of this process alone would leave out torchvision's workers.
@pytest.mark.benchmark(timer=perf_counter)
@pytest.mark.parametrize("name", CASES)
def test_engine(name: str, contend: Any, keep: Any, device: str, tiny: bool, pytestconfig: Any) -> None:
    preset, size, local_views, engines = CASES[name]
    images = images_of(name, tiny, pytestconfig)
    specs = pipelines.view_preset(preset, size, local_views=local_views, **HALF)

    def loader(engine: str) -> Loader:
        base, _, color = engine.partition(" ")
        colored = [replace(spec, color=color or "torchvision") for spec in specs]
        options = {"batch_size": min(256 if size < 100 else 32, len(images)), "device": device, "workers": 2}
        return pipelines.build(images, colored, engine=base, training=False, **options)

    epochs = {engine: Epoch(lambda engine=engine: loader(engine)) for engine in engines}
    case, rates = {"images": name, "count": len(images)}, {"images_per_second": len(images)}
    found = contend(case, epochs, counts=rates)
    shown = {
        engine: torch.stack([view for view in next(iter(loader(engine))).views if view.shape[-1] == size])
        for engine in engines
        if "seconds" in found[engine]
    }
    for engine, views in shown.items():
        row, cpu = found[engine], statistics.median(epochs[engine].cpu[2:]) / len(images)
        row["cpu_ms_per_image"] = 1e3 * cpu
        if engine != "torchvision" and "torchvision" in shown:
            gap = (views - shown["torchvision"]).abs() * GRAY_LEVELS
            # At the edge of a crop engines may differ in which pixels they repeat.
            inside = gap[..., 1:-1, 1:-1].max().item()
            row |= {"mean_difference": gap.mean().item(), "largest_difference_inside": inside}
    keep(case, found)


def images_of(name: str, tiny: bool, config: Any) -> Any:
    """What a case is measured on, or the reason why it is not."""
    if name.startswith("digits"):
        digits = pipelines.open_images("digits")
        assert isinstance(digits, ArrayImages)
        return ArrayImages(digits.images[:64]) if tiny else digits
    if name.startswith("photos"):
        photos = config.getoption("photos")
        if photos is None:
            pytest.skip("photos: give a folder with --photos FOLDER")
        files = pipelines.open_images("folder", photos)
        assert isinstance(files, FileImages)
        # Evenly spread over the folder, so that torchvision takes half a minute per epoch.
        return FileImages(files.paths[:: -(-len(files) // (4 if tiny else 200))])
    cifar10: Path | None = config.getoption("cifar10")
    if cifar10 is None:
        shape = (64 if tiny else 2048, 32, 32, 3)
        return ArrayImages(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    images = pipelines.open_images("npz", cifar10)
    assert isinstance(images, ArrayImages)
    return ArrayImages(images.images[:2048])


@pytest.mark.parametrize("function", [augment_views, color_views])
@pytest.mark.parametrize(("count", "size"), [(256, 32), (4096, 32), (256, 224)])
def test_kernel(
    function: Callable[..., object], count: int, size: int, contend: Any, device: str, tiny: bool
) -> None:
    """Triton's kernels beside batched PyTorch on the same device."""
    count = 2 if tiny else count
    spec = pipelines.view_preset("simclr", size, **HALF)[0]
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
    (drawn,) = Draws((spec,), 0)(np.arange(count), np.full(count, size), np.full(count, size), 0)
    options = HALF | {"blur_kernel": spec.blur_kernel} | ({"size": size} if function is augment_views else {})
    contenders = {
        name: lambda name=name: function(images, drawn, implementation=name, **options)
        for name in (["triton"] if device == "cuda" else []) + ["chunked"]
    }
    case = {"function": function.__name__, "images": count, "size": size}
    contend(case, contenders, counts={"views_per_second": count})
