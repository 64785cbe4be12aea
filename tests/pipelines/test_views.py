"""Published sets of views, what may be changed of them, and multi-crop through every engine."""

from itertools import combinations

import numpy as np
import pytest
import torch

from fastgessl.pipelines import ArrayImages, DataError, build, count_views, view_preset

HALF = (0.5, 0.5, 0.5)


def preset(name, size=224, **changes):
    return view_preset(name, size, mean=HALF, std=HALF, **changes)


# brightness, contrast, saturation, hue; crop scale; blur and solarize of each global view; number, scale and
# blur of local ones.
PUBLISHED = {
    "simclr": ((0.8, 0.8, 0.8, 0.2), (0.08, 1.0), (0.5, 0.5), (0.0, 0.0), 0, None, None),
    "moco": ((0.4, 0.4, 0.4, 0.1), (0.2, 1.0), (0.5, 0.5), (0.0, 0.0), 0, None, None),
    "byol": ((0.4, 0.4, 0.2, 0.1), (0.08, 1.0), (1.0, 0.1), (0.0, 0.2), 0, None, None),
    "barlow": ((0.4, 0.4, 0.2, 0.1), (0.08, 1.0), (1.0, 0.1), (0.0, 0.2), 0, None, None),
    "swav": ((0.8, 0.8, 0.8, 0.2), (0.14, 1.0), (0.5, 0.5), (0.0, 0.0), 6, (0.05, 0.14), 0.5),
    "dino": ((0.4, 0.4, 0.2, 0.1), (0.4, 1.0), (1.0, 0.1), (0.0, 0.2), 8, (0.05, 0.4), 0.5),
    "dissl": ((1.6, 1.6, 1.6, 0.4), (0.08, 1.0), (0.5, 0.5), (0.0, 0.0), 0, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_those_of_the_papers(name):
    jitter, scale, blur, solarize, local_views, local_scale, local_blur = PUBLISHED[name]
    views = preset(name)
    full, local = views[:2], views[2:]
    assert [(view.size, view.local, view.blur_kernel, view.crop_scale) for view in full] == [
        (224, False, 23, scale)
    ] * 2
    assert (
        tuple(view.blur_probability for view in full) == blur
        and tuple(view.solarize_probability for view in full) == solarize
    )
    assert [(view.size, view.local, view.crop_scale, view.blur_probability) for view in local] == [
        (96, True, local_scale, local_blur)
    ] * local_views
    for view in views:
        assert (view.brightness, view.contrast, view.saturation, view.hue) == pytest.approx(jitter)
        assert (view.flip_probability, view.jitter_probability, view.grayscale_probability) == (0.5, 0.8, 0.2)
    assert count_views(views) == (2, local_views)


def test_what_is_given_replaces_the_presets_value_in_every_view():
    views = preset(
        "dino",
        32,
        crop_scale=(0.2, 0.9),
        flip_probability=0.0,
        jitter_probability=0.1,
        jitter_strength=0.5,
        grayscale_probability=0.0,
        blur_probability=0.0,
        solarize_probability=(0.25,),
    )
    assert len(views) == 10
    for view in views:
        assert view.crop_scale == ((0.05, 0.4) if view.local else (0.2, 0.9))
        assert (view.flip_probability, view.jitter_probability, view.grayscale_probability) == (0.0, 0.1, 0.0)
        assert (view.brightness, view.hue, view.blur_probability, view.solarize_probability) == (
            0.2,
            0.05,
            0.0,
            0.25,
        )


def test_every_preset_takes_further_views_and_gives_them_up():
    views = preset("simclr", 64, local_views=3, local_size=20, local_crop_scale=(0.1, 0.3))
    assert [(view.size, view.local, view.crop_scale) for view in views[2:]] == [(20, True, (0.1, 0.3))] * 3
    assert count_views(preset("dino", local_views=0)) == (2, 0)
    assert count_views(preset("swav", global_views=1, local_views=2)) == (1, 2)
    assert [view.solarize_probability for view in preset("byol", global_views=5)] == [0.0, 0.2, 0.0, 0.2, 0.0]


@pytest.mark.parametrize(
    ("chances", "expected"),
    [
        (0.3, [0.3] * 4),
        ([0.3], [0.3] * 4),
        ((1.0, 0.1), [1.0, 0.1, 0.5, 0.5]),
        ((1.0, 0.1, 0.7), [1.0, 0.1, 0.7, 0.7]),
    ],
)
def test_blur_may_differ_from_view_to_view(chances, expected):
    views = preset("simclr", 64, local_views=2, blur_probability=chances)
    assert [view.blur_probability for view in views] == expected


@pytest.mark.parametrize("engine", ["resident", "dali", "torchvision"])
def test_every_engine_shows_global_views_then_local_ones(engine):
    pytest.importorskip({"resident": "torch", "dali": "nvidia.dali", "torchvision": "torchvision"}[engine])
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    views = preset("swav", 32, local_views=3, local_size=12)
    loader = build(ArrayImages(pixels), views, batch_size=4, engine=engine, workers=1)
    (batch,) = loader
    loader.close()
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 12, 12)] * 3
    assert all(
        view.is_contiguous(memory_format=torch.channels_last) and view.dtype == torch.float32
        for view in batch.views
    )
    assert not any(torch.equal(first, second) for first, second in combinations(batch.views, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "simclear"}, "views.preset 'simclear' is unknown. Choose one of simclr"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale must be two ordered shares"),
        ({"crop_scale": (0.2, 1.5)}, "crop_scale must be two ordered shares"),
        ({"flip_probability": 1.2}, "flip_probability must be in"),
        ({"jitter_strength": -1.0}, "jitter_strength must be 0 or more"),
        ({"jitter_strength": 4.0}, "hue must be in"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"size": 0}, "size must be at least 1"),
        ({"global_views": 0}, "global_views must be at least 1"),
        ({"local_views": -1}, "local_views must be 0 or more"),
        (
            {"local_views": 2, "local_size": 33},
            "local_size must be from 1 to views.size 32: a local view is no larger than a global one",
        ),
        ({"local_views": 2, "local_crop_scale": (0.5, 0.1)}, "crop_scale must be two ordered shares"),
        (
            {"blur_probability": (0.1, 0.2, 0.3, 0.4)},
            "blur_probability must be one number, or 2, one per global view, or 3",
        ),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        view_preset(**({"preset": "simclr", "size": 32, "mean": HALF, "std": HALF} | options))
