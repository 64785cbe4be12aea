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


def growth(source, warm, count):
    """Bytes by which memory grew over `count` batches after `warm` ones, the epochs following each other."""
    batches = itertools.chain.from_iterable(itertools.repeat(source))
    for _ in range(warm):
        next(batches)
    gc.collect()
    before = resident_bytes()
    for _ in range(count):
        next(batches)
    gc.collect()
    return resident_bytes() - before


@pytest.fixture
def sources(photos):
    views = view_preset("byol", 48, mean=(0.5,) * 3, std=(0.5,) * 3, local_views=2)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 20, 20, 3), dtype=np.uint8)

    def build_source(engine):
        pytest.importorskip({"resident": "torch", "dali": "nvidia.dali"}[engine])
        images = ArrayImages(pixels) if engine == "resident" else open_images("folder", photos)
        return build(images, views, batch_size=4, engine=engine, workers=1)

    return build_source


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("engine", ["resident", "dali"])
def test_memory_is_flat_over_hundreds_of_batches(sources, engine):
    source = sources(engine)
    # 150 batches of views are 38 MiB: keeping every third one would show.
    assert growth(source, 50, 150) < 12 * MIB
    source.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("engine", ["resident", "dali"])
def test_memory_is_flat_over_ten_thousand_batches(sources, engine):
    source = sources(engine)
    grown = growth(source, 500, 10_000)
    print(f"{engine}: {grown / MIB:.1f} MiB over 10,000 batches")
    assert grown < 12 * MIB
    source.close()
