"""The torchvision engine: the same draws in a DataLoader's processes."""

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
    found = {engine: list(build(images, VIEWS, batch_size=4, engine=engine, workers=1)) for engine in ("torchvision", "resident")}
    for ours, theirs in zip(found["torchvision"], found["resident"], strict=True):
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.label, ours.index)
        for first, second in zip(ours.views, theirs.views, strict=True):
            # torchvision rounds the crop to bytes.
            assert ((first - second).abs() * 127.5).mean() < 1 and first.is_contiguous(memory_format=torch.channels_last)


def test_epochs_resume_and_workers_do_not_change_what_is_shown(photos):
    images = open_images("folder", photos)
    one, three = (build(images, VIEWS, batch_size=4, engine="torchvision", workers=workers) for workers in (1, 2))
    whole = [batch for _ in range(2) for batch in one]
    next(iter(three))
    resumed = build(images, VIEWS, batch_size=4, engine="torchvision", workers=2)
    resumed.load_state_dict(three.state_dict())
    seen = [batch for _ in range(2) for batch in resumed]
    assert len(seen) == 5
    for found, expected in zip(seen, whole[1:], strict=True):
        assert torch.equal(found.index, expected.index) and all(map(torch.equal, found.views, expected.views))
