"""DALI's own colours (views.color yiq) against torchvision's with the same draws, and against YIQ itself."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from fastgessl.pipelines import ArrayImages, DataError, FileImages, ViewSpec, build, open_images, view_preset
from fastgessl.pipelines.draws import Draws

PLAIN = ViewSpec(size=24, mean=(0, 0, 0), std=(1 / 255,) * 3, jitter_probability=1.0)


def first_batch(images, views, **options):
    loader = build(
        images, views, **({"engine": "dali", "batch_size": len(images), "seed": 1, "workers": 1} | options)
    )
    batch = next(iter(loader))
    loader.close()
    return batch.views


def gap(images, spec):
    """|yiq - torchvision| of one view, (B, 3, S, S) grey levels of 255."""
    (exact,), (ours,) = (
        first_batch(images, [replace(spec, color=color)]) for color in ("torchvision", "yiq")
    )
    return (ours - exact).abs()


@pytest.mark.parametrize(
    "change",
    [{"brightness": 0.8}, {"contrast": 0.8}, {"saturation": 0.8}, {"grayscale_probability": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_all_but_hue_differ_from_torchvision_by_rounding(photos, change):
    found = gap(open_images("folder", photos), replace(PLAIN, **change))
    print(f"{next(iter(change)):22s} mean {found.mean():.2f}, max {found.max():.1f} of 255")
    # Bytes against floats: half a level, and DALI's luma weights have three digits where torchvision's have
    # four.
    assert found.mean() < 0.45 and found.max() < 1.2


def test_hue_turns_in_yiq():
    colours = np.random.default_rng(0).integers(60, 196, (20, 3))
    pixels = np.broadcast_to(colours[:, None, None], (20, 8, 8, 3)).astype(np.uint8)
    spec = ViewSpec(size=8, mean=(0, 0, 0), std=(1 / 255,) * 3, hue=0.1, jitter_probability=1.0, color="yiq")
    images = ArrayImages(np.ascontiguousarray(pixels))
    (view,) = first_batch(images, [spec], training=False)
    (drawn,) = Draws((spec,), 1)(np.arange(20), np.full(20, 8), np.full(20, 8), 0)
    for colour, turns, found in zip(
        colours / 255, drawn.factors[:, 3].tolist(), view[:, :, 4, 4], strict=True
    ):
        y, i, q = colorsys.rgb_to_yiq(*colour)
        cosine, sine = math.cos(2 * math.pi * turns), math.sin(-2 * math.pi * turns)
        expected = torch.tensor(colorsys.yiq_to_rgb(y, i * cosine - q * sine, i * sine + q * cosine)) * 255
        assert (found - expected).abs().max() < 1.6
    assert gap(images, spec).mean() > 4


def test_only_what_was_drawn_to_change_changes(photos):
    images = open_images("folder", photos)
    still = replace(PLAIN, jitter_probability=0.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
    assert gap(images, still).max() == 0
    some = replace(still, jitter_probability=0.5)
    (shown,), (unchanged,) = (
        first_batch(images, [replace(spec, color="yiq")], training=False) for spec in (some, still)
    )
    sizes = np.full(len(images), 50)
    (drawn,) = Draws((some,), 1)(np.arange(len(images)), sizes, sizes, 0)
    assert (
        (shown - unchanged).abs().amax(dim=(1, 2, 3)) > 0
    ).tolist() == drawn.jitter.tolist() and 0 < drawn.jitter.sum() < len(images)


def test_views_of_both_kinds_stand_side_by_side_with_blur_and_solarisation(photos):
    images = open_images("folder", photos)
    views = view_preset("byol", 24, mean=(0.5,) * 3, std=(0.5,) * 3, local_views=1)
    alone = first_batch(images, views)
    mixed = first_batch(images, [views[0], replace(views[1], color="yiq"), views[2]])
    assert torch.equal(mixed[0], alone[0]) and torch.equal(mixed[2], alone[2])
    assert 0 < (mixed[1] - alone[1]).abs().mean() * 127.5 < 12


@pytest.mark.parametrize(
    ("recipe", "mean", "largest"), [("hue", 14, 140), ("simclr", 8, 170), ("byol", 6, 130)]
)
def test_on_real_photos_the_difference_is_the_documented_one(real_photos, recipe, mean, largest):
    images = FileImages(real_photos("val", count=24))
    still = {"size": 96, "mean": PLAIN.mean, "std": PLAIN.std}
    spec = (
        ViewSpec(**still, hue=0.2, jitter_probability=1.0)
        if recipe == "hue"
        else view_preset(recipe, **{"local_views": 0} | still)[0]
    )
    found = gap(images, spec)
    means, extremes = found.mean(dim=(0, 2, 3)), found.amax(dim=(0, 2, 3))
    print(
        f"{recipe:8s} red, green, blue: mean {[round(x, 1) for x in means.tolist()]}, max "
        f"{[round(x) for x in extremes.tolist()]} of 255"
    )
    assert means.min() > 1 and means.max() < mean and extremes.max() < largest


@pytest.mark.gpu
def test_on_a_gpu_dalis_colours_are_those_of_its_cpu(photos):
    images, spec = (
        open_images("folder", photos),
        replace(view_preset("simclr", 24, mean=(0, 0, 0), std=(1 / 255,) * 3)[0], color="yiq"),
    )
    (ours,), (theirs,) = (first_batch(images, [spec], device=device) for device in ("cpu", "cuda"))
    # nvJPEG and libjpeg-turbo decode to within a level or two of each other, which jitter may enlarge.
    assert (ours - theirs.cpu()).abs().mean() < 3


@pytest.mark.parametrize("engine", ["resident", "torchvision", "auto"])
def test_another_engine_refuses_them_in_one_line(engine):
    images = ArrayImages(np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(
        DataError,
        match=r"views.color yiq is DALI's, and the engine is (resident|torchvision). "
        "Use data.engine dali, or",
    ):
        build(images, [replace(PLAIN, size=8, color="yiq")], batch_size=2, engine=engine)


def test_another_word_is_refused():
    with pytest.raises(DataError, match="color must be torchvision or yiq, found hsl"):
        replace(PLAIN, color="hsl")
