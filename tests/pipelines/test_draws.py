"""Draws: pure in (seed, epoch, image, view), from Philox's published numbers, and distributed as
torchvision's.
"""

import numpy as np
import pytest
import torch

from fastgessl.pipelines import ViewSpec, evaluation_view, view_preset
from fastgessl.pipelines.draws import Draws, epoch_order, key_of, philox, uniforms

HALF = (0.5, 0.5, 0.5)
SPEC = view_preset("simclr", 32, mean=HALF, std=HALF)[0]


def drawn(spec=SPEC, index=range(100), height=40, width=60, seed=0, epoch=0, view=0):
    index = np.asarray(index)
    sizes = np.full(len(index), height), np.full(len(index), width)
    return Draws((spec,) * (view + 1), seed)(index, *sizes, epoch)[view]


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


def test_a_draw_does_not_depend_on_what_else_is_drawn():
    together, shuffled = drawn(index=range(200)), drawn(index=[150, 3, 77])
    assert same(together[torch.tensor([150, 3, 77])], shuffled)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_seed_epoch_and_view_change_the_draw(change):
    assert not same(drawn(), drawn(**change)) and same(drawn(**change), drawn(**change))


def test_views_of_other_kinds_are_numbered_through():
    first, second = view_preset("byol", 32, mean=HALF, std=HALF)
    sizes = np.array([40, 40]), np.array([60, 60])
    both = Draws((first, second), seed=5)(np.array([1, 2]), *sizes, epoch=3)
    assert same(both[1], drawn(second, [1, 2], seed=5, epoch=3, view=1))


@pytest.mark.parametrize(
    ("size", "spec"),
    [((40, 60), SPEC), ((60, 40), SPEC), ((8, 8), SPEC), ((20, 300), SPEC), ((1, 1), SPEC)],
    ids=["wide", "tall", "tiny", "panorama", "pixel"],
)
def test_crops_are_distributed_as_random_resized_crops(size, spec):
    stats = pytest.importorskip("scipy.stats")
    transforms = pytest.importorskip("torchvision.transforms.v2")
    ours = drawn(spec, range(3000), *size).crop.numpy()
    torch.manual_seed(0)
    theirs = transforms.RandomResizedCrop(32, scale=spec.crop_scale, ratio=spec.crop_ratio)
    image = torch.zeros(3, *size)
    expected = np.array(
        [
            [params[key] for key in ("top", "left", "height", "width")]
            for params in (theirs.make_params([image]) for _ in range(3000))
        ]
    )
    for ours_column, their_column in zip(ours.T, expected.T, strict=True):
        assert stats.ks_2samp(ours_column, their_column, method="asymp").pvalue > 1e-3
    assert (
        stats.ks_2samp(ours[:, 2] * ours[:, 3], expected[:, 2] * expected[:, 3], method="asymp").pvalue > 1e-3
    )
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all() and (ours[:, :2] + ours[:, 2:] <= size).all()


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (10, 10)], ids=["wide", "tall", "square"])
def test_a_crop_that_never_fits_falls_back_to_torchvisions_central_crop(size):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    # Nine tenths of 400 x 10, or of any square at a ratio of 1.3, do not fit into it.
    ranges = {"scale": (0.9, 1.0), "ratio": (0.75, 1.3) if size[0] != size[1] else (1.3, 1.33)}
    spec = ViewSpec(size=8, mean=HALF, std=HALF, crop_scale=ranges["scale"], crop_ratio=ranges["ratio"])
    params = transforms.RandomResizedCrop(8, **ranges).make_params([torch.zeros(3, *size)])
    crops = drawn(spec, range(20), *size).crop
    assert crops.unique(dim=0).tolist() == [
        [params["top"], params["left"], params["height"], params["width"]]
    ]


def test_chances_factors_and_sigmas_are_distributed_as_asked():
    stats = pytest.importorskip("scipy.stats")
    spec = ViewSpec(
        size=32,
        mean=HALF,
        std=HALF,
        flip_probability=0.3,
        jitter_probability=0.6,
        brightness=0.4,
        contrast=1.5,
        saturation=0.2,
        hue=0.1,
        grayscale_probability=0.2,
        blur_probability=0.7,
        blur_sigma=(0.5, 1.5),
        solarize_probability=0.1,
    )
    count = 4000
    views = drawn(spec, range(count))
    for values, chance in (
        (views.flip, 0.3),
        (views.jitter, 0.6),
        (views.grayscale, 0.2),
        (views.blur_sigma > 0, 0.7),
        (views.solarize, 0.1),
    ):
        assert stats.binomtest(int(values.sum()), count, chance).pvalue > 1e-3
    # contrast 1.5 would reach below 0, where torchvision clips its range.
    for column, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        assert stats.kstest(views.factors[:, column].numpy(), "uniform", args=(low, high - low)).pvalue > 1e-3
    sigma = views.blur_sigma[views.blur_sigma > 0].numpy()
    assert stats.kstest(sigma, "uniform", args=(0.5, 1.0)).pvalue > 1e-3
    orders, counts = views.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    # Two decisions of one sample are independent of each other.
    table = np.histogram2d(views.flip.numpy(), views.grayscale.numpy(), bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_an_evaluation_view_leaves_nothing_to_chance():
    spec = evaluation_view(64, mean=HALF, std=HALF)
    views, others = drawn(spec, seed=0), drawn(spec, seed=1, epoch=9, view=3)
    assert torch.equal(views.crop, others.crop) and torch.equal(views.reach, others.reach)
    assert not (views.flip | views.jitter | views.grayscale | views.solarize | (views.blur_sigma > 0)).any()


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (32, 32), (500, 333)])
@pytest.mark.parametrize("view", [32, 96])
def test_the_evaluation_view_is_resize_and_centre_crop(size, view):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    from fastgessl.kernels.views.torch import augment_views

    image = torch.randint(
        0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    spec = evaluation_view(view, mean=(0, 0, 0), std=(1, 1, 1))
    ours = augment_views(image, drawn(spec, [0], *size), size=view, mean=spec.mean, std=spec.std)
    resized = functional.resize(image.permute(0, 3, 1, 2).float() / 255, [110 if view == 96 else 32])
    assert (ours - functional.center_crop(resized, [view])).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == expected


def test_seeds_and_epochs_beyond_a_word_have_keys_of_their_own():
    # As bare words of 32 bits, zeros behind them left out, each of these lines is one and the same.
    words = (
        [(5, 3), (5 + 3 * 2**32, 0)],
        [(2**32, 5), (0, 1 + 5 * 2**32)],
        [(7, 0), (7, 2**32)],
        [(2**64, 1), (0, 2**96)],
    )
    for alike in words:
        assert len({key_of(seed, epoch) for seed, epoch in alike}) == len(alike)


def test_keys_of_a_seed_and_an_epoch_of_one_word_stay_what_they_were():
    # numpy's SeedSequence of both, recorded: other keys are other views in a resumed run.
    assert key_of(0, 0) == (2968811710, 3677149159)
    assert key_of(3, 4) == tuple(
        int(word) for word in np.random.SeedSequence((3, 4)).generate_state(2, np.uint32)
    )


def test_seed_epoch_stream_block_and_sample_each_change_the_numbers():
    def first(index=5, stream=0, block=0, seed=3, epoch=4):
        return uniforms(np.array([index]), stream, range(block, block + 1), key_of(seed, epoch)).tobytes()

    # 5 + 2**32 differs from 5 in the second counter word only; a seed may be larger than a key word.
    varied = {
        first(),
        first(index=6),
        first(index=5 + 2**32),
        first(stream=1),
        first(block=1),
        first(seed=2**70),
        first(epoch=5),
        first(seed=4, epoch=3),
    }
    assert len(varied) == 8


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(50)) for order in orders)


def test_every_image_is_equally_likely_at_every_place():
    stats = pytest.importorskip("scipy.stats")
    orders = np.stack([epoch_order(8, 0, epoch) for epoch in range(2000)])
    for place in range(8):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=8)).pvalue > 1e-3
    # Successive images are independent too: all 56 ordered pairs are equally likely.
    pairs = np.bincount(orders[:, 0] * 8 + orders[:, 1], minlength=64).reshape(8, 8)
    assert stats.chisquare(pairs[~np.eye(8, dtype=bool)]).pvalue > 1e-3
