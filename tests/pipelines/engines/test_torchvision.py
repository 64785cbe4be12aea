"""The torchvision engine's worker processes. What it shows is compared in the tests of the other engines."""

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("torchvision")


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
