"""Memory does not grow with the number of batches."""

import gc
import itertools
from pathlib import Path

import numpy as np
import pytest

from fastgessl.pipelines import ArrayImages, build, open_images, view_preset

MIB = 1 << 20


def resident_bytes():
    """Of this process and no other."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


# 150 batches of views are 38 MiB: keeping every third one would show.
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("engine", ["resident", "dali"])
@pytest.mark.parametrize(
    ("warm", "count"), [(50, 150), pytest.param(500, 10_000, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_memory_is_flat_over_batches(photos, engine, warm, count):
    pytest.importorskip({"resident": "torch", "dali": "nvidia.dali"}[engine])
    views = view_preset("byol", 48, mean=(0.5,) * 3, std=(0.5,) * 3, local_views=2)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 20, 20, 3), dtype=np.uint8)
    images = ArrayImages(pixels) if engine == "resident" else open_images("folder", photos)
    source = build(images, views, batch_size=4, engine=engine, workers=1)
    batches = itertools.chain.from_iterable(itertools.repeat(source))
    held = []
    for further in (warm, count):
        for _ in range(further):
            next(batches)
        gc.collect()
        held.append(resident_bytes())
    print(f"{engine}: {(held[1] - held[0]) / MIB:.1f} MiB over {count} batches")
    assert held[1] - held[0] < 12 * MIB
    source.close()
