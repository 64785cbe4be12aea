"""The torchvision engine: the same draws in a DataLoader's processes."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from fastgessl.pipelines import ArrayImages, build, open_images, view_preset

HALF = (0.5, 0.5, 0.5)
VIEWS = view_preset("byol", 16, mean=HALF, std=HALF)


def test_arrays_give_the_views_of_the_resident_engine():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 20, 3), dtype=np.uint8)
    images = ArrayImages(pixels, np.arange(9, dtype=np.int64))
    found = {
        engine: list(build(images, VIEWS, batch_size=4, engine=engine, workers=1))
        for engine in ("torchvision", "resident")
    }
    for ours, theirs in zip(found["torchvision"], found["resident"], strict=True):
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.label, ours.index)
        for first, second in zip(ours.views, theirs.views, strict=True):
            # torchvision rounds the crop to bytes.
            assert ((first - second).abs() * 127.5).mean() < 1 and first.is_contiguous(
                memory_format=torch.channels_last
            )


def test_epochs_resume_and_workers_do_not_change_what_is_shown(photos):
    images = open_images("folder", photos)
    one, three = (
        build(images, VIEWS, batch_size=4, engine="torchvision", workers=workers) for workers in (1, 2)
    )
    whole = [batch for _ in range(2) for batch in one]
    next(iter(three))
    resumed = build(images, VIEWS, batch_size=4, engine="torchvision", workers=2)
    resumed.load_state_dict(three.state_dict())
    seen = [batch for _ in range(2) for batch in resumed]
    assert len(seen) == 5
    for found, expected in zip(seen, whole[1:], strict=True):
        assert torch.equal(found.index, expected.index) and all(map(torch.equal, found.views, expected.views))


# A DALI loader becomes garbage that only the collector finds, and the first to collect is a forked worker.
COLLECTING_WORKER = """
import gc, os, sys
from pathlib import Path
from fastgessl.pipelines import FileImages, ViewSpec, build, open_images

class Collecting(FileImages):
    def read(self, image):
        gc.collect()
        return super().read(image)

images, view = open_images("folder", Path(sys.argv[1])), ViewSpec(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
gc.disable()
loader = build(images, [view], batch_size=4, engine="dali", workers=2)
next(iter(loader))
cycle = [loader]
cycle.append(cycle)
del loader, cycle
shown = build(Collecting(images.paths), [view], batch_size=4, engine="torchvision", workers=1, training=False)
print([len(batch.index) for batch in shown], flush=True)
os._exit(0)
"""


def test_a_worker_does_not_collect_a_dali_pipeline_of_its_parent(photos):
    pytest.importorskip("nvidia.dali")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", COLLECTING_WORKER, photos],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.communicate(timeout=120)[0] == "[4, 4, 4, 2]\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
