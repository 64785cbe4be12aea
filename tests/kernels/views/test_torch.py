"""Batched views against torchvision's functions on float tensors, and against their one-image definition."""

import math

import pytest
import torch
from drawn_views import MEAN, STD, images_of, random_parameters

from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.kernels.views.reference import augment_view_reference
from fastgessl.kernels.views.torch import augment_views, color_views


def only(parameters: ViewParameters, *kept: str) -> ViewParameters:
    """`parameters` with every operation but those `kept` switched off."""
    count = len(parameters)
    neutral = ViewParameters.unchanged(count, 1, 1)
    kept = (*kept, "crop", "reach", "order")
    return ViewParameters(
        **{name: getattr(parameters if name in kept else neutral, name) for name in vars(parameters)}
    )


def torchvision_view(
    image,
    drawn,
    *,
    size,
    interpolation="bilinear",
    blur_kernel=23,
    solarize_threshold=128.0,
    mean=MEAN,
    std=STD,
):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    view = image.permute(2, 0, 1).float() / 255
    top, left, height, width = (int(value) for value in drawn.crop[0])
    mode = functional.InterpolationMode(interpolation)
    view = functional.resized_crop(
        view, top, left, height, width, [size, size], interpolation=mode, antialias=True
    ).clamp(0, 1)
    view = functional.horizontal_flip(view) if drawn.flip[0] else view
    if drawn.jitter[0]:
        names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
        for operation in drawn.order[0].tolist():
            view = getattr(functional, names[operation])(view, drawn.factors[0, operation].item())
    view = functional.rgb_to_grayscale(view, 3) if drawn.grayscale[0] else view
    view = (
        functional.gaussian_blur(view, [blur_kernel] * 2, [drawn.blur_sigma[0].item()])
        if drawn.blur_sigma[0] > 0
        else view
    )
    view = functional.solarize(view, solarize_threshold / 255) if drawn.solarize[0] else view
    return functional.normalize(view, list(mean), list(std))


def difference(images: torch.Tensor, drawn: ViewParameters, **options) -> torch.Tensor:
    """|augment_views - torchvision|, in grey levels of 255."""
    ours = augment_views(images, drawn, mean=MEAN, std=STD, **options)
    theirs = torch.stack(
        [torchvision_view(image, drawn[row : row + 1], **options) for row, image in enumerate(images)]
    )
    return (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255


OPERATIONS = {
    "crop and bilinear resize": ((), {"interpolation": "bilinear"}),
    "crop and bicubic resize": ((), {"interpolation": "bicubic"}),
    "flip": (("flip",), {}),
    "jitter in each sample's order": (("jitter", "factors"), {}),
    "grayscale": (("grayscale",), {}),
    "blur": (("blur_sigma",), {}),
    "solarize": (("solarize",), {}),
    "solarize from 200": (("solarize",), {"solarize_threshold": 200.0}),
    "whole recipe, bilinear": (tuple(vars(ViewParameters.unchanged(1, 1, 1))), {"interpolation": "bilinear"}),
    "whole recipe, bicubic": (tuple(vars(ViewParameters.unchanged(1, 1, 1))), {"interpolation": "bicubic"}),
}


@pytest.mark.parametrize(
    "shape", [(8, 8, 16, 3), (32, 45, 32, 5), (150, 100, 64, 23)], ids=["enlarged", "small", "reduced"]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_augment_views_equals_torchvision(name, shape):
    height, width, size, kernel = shape
    kept, options = OPERATIONS[name]
    images, drawn = images_of(24, height, width), only(random_parameters(24, height, width), *kept)
    found = difference(images, drawn, size=size, blur_kernel=kernel, **options)
    print(f"{name:32s} {height}x{width} -> {size}: mean {found.mean():.1e}, max {found.max():.1e} of 255")
    assert found.max() < 0.02


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_augment_views_equals_its_definition_in_float64(interpolation):
    images, drawn = images_of(12, 13, 17), random_parameters(12, 13, 17, seed=1)
    # The crop may be finer than a pixel, and interpolation may read beyond it.
    whole = torch.tensor([[0.0, 0.0, 13.0, 17.0]]).repeat(6, 1)
    drawn.crop[:6] = torch.tensor([[1.25, 2.5, 7.75, 11.5]])
    drawn = ViewParameters(**(vars(drawn) | {"reach": torch.cat([whole, drawn.reach[6:]])}))
    options = {
        "size": 9,
        "mean": MEAN,
        "std": STD,
        "interpolation": interpolation,
        "blur_kernel": 5,
        "solarize_threshold": 100.0,
    }
    ours = augment_views(images, drawn, **options)
    expected = torch.stack(
        [augment_view_reference(image, drawn[row : row + 1], **options) for row, image in enumerate(images)]
    )
    torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=0)


def test_color_views_is_the_part_after_the_crop():
    images = images_of(10, 12, 12)
    drawn = only(random_parameters(10, 12, 12), "jitter", "factors", "grayscale", "blur_sigma", "solarize")
    whole = ViewParameters.unchanged(10, 12, 12)
    drawn = ViewParameters(**(vars(drawn) | {"crop": whole.crop, "reach": whole.reach}))
    ours = color_views(images, drawn, mean=MEAN, std=STD, blur_kernel=3)
    torch.testing.assert_close(
        ours, augment_views(images, drawn, size=12, mean=MEAN, std=STD, blur_kernel=3), atol=1e-5, rtol=0
    )


def test_a_view_of_an_image_does_not_depend_on_its_batch(monkeypatch):
    images, drawn = images_of(20, 16, 16), random_parameters(20, 16, 16)
    together = augment_views(images, drawn, size=16, mean=MEAN, std=STD, blur_kernel=3)
    monkeypatch.setattr("fastgessl.kernels.views.torch.CPU_CHUNK_PIXELS", 7 * 256)
    chunked = augment_views(images, drawn, size=16, mean=MEAN, std=STD, blur_kernel=3)
    torch.testing.assert_close(together, chunked, atol=1e-5, rtol=0)
    alone = augment_views(images[13:14], drawn[13:14], size=16, mean=MEAN, std=STD, blur_kernel=3)
    torch.testing.assert_close(together[13:14], alone, atol=1e-5, rtol=0)


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("three_threads")
def test_views_are_float32_channels_last_and_leave_threads_and_images_alone():
    images, drawn = images_of(6, 9, 9), random_parameters(6, 9, 9)
    before = images.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = augment_views(images, drawn, size=10, mean=MEAN, std=STD, blur_kernel=3)
    assert views.dtype == torch.float32 and views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, augment_views(images, drawn, size=10, mean=MEAN, std=STD, blur_kernel=3))
    assert torch.equal(images, before) and torch.get_num_threads() == 3


def test_the_default_dtype_plays_no_part():
    images, drawn = images_of(6, 9, 9), random_parameters(6, 9, 9)
    options = {"size": 10, "mean": MEAN, "std": STD, "blur_kernel": 3, "interpolation": "bicubic"}
    expected = augment_views(images, drawn, **options)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(augment_views(images, drawn, **options), expected, atol=1e-5, rtol=0)
        assert augment_views(images, ViewParameters.unchanged(6, 9, 9), **options).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_unchanged_view_is_the_normalised_image():
    images = images_of(3, 11, 11)
    views = augment_views(images, ViewParameters.unchanged(3, 11, 11), size=11, mean=MEAN, std=STD)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(views, expected, atol=1e-5, rtol=0)


def test_an_empty_batch_gives_no_views():
    images = torch.zeros(0, 8, 8, 3, dtype=torch.uint8)
    assert augment_views(images, ViewParameters.unchanged(0, 8, 8), size=4, mean=MEAN, std=STD).shape == (
        0,
        3,
        4,
        4,
    )


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 8, 8, 3), {}, r"\(B, H, W, 3\) uint8, found \(2, 8, 8, 3\) torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, r"found \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), {}, "describe 2 images, but 3 were given"),
        (
            torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
            {"interpolation": "nearest"},
            "'bilinear' or 'bicubic', found 'nearest'",
        ),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {"blur_kernel": 4}, "odd and at most 15"),
        (
            torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
            {"blur_kernel": 17},
            "odd and at most 15 for views of 8 pixels, found 17",
        ),
    ],
)
def test_what_does_not_fit_is_named(images, options, message):
    drawn = ViewParameters(**(vars(ViewParameters.unchanged(2, 8, 8)) | {"blur_sigma": torch.ones(2)}))
    with pytest.raises(ValueError, match=message):
        augment_views(images, drawn, size=8, mean=MEAN, std=STD, **options)


def beside(name, row):
    """Parameters of three images of 8 x 10, the second with another crop or reach."""
    drawn = ViewParameters.unchanged(3, 8, 10)
    changed = getattr(drawn, name).clone()
    changed[1] = torch.tensor(row)
    return ViewParameters(**(vars(drawn) | {name: changed}))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("reach", [-1.0, 0.0, 8.0, 10.0]),
        ("reach", [0.0, 0.0, 9.0, 10.0]),
        ("reach", [0.0, 4.0, 8.0, 7.0]),
        ("reach", [3.0, 3.0, 0.0, 3.0]),
        ("crop", [-12.0, 0.0, 8.0, 10.0]),
        ("crop", [0.0, 8.0, 8.0, 10.0]),
        ("crop", [2.0, 2.0, 0.0, 2.0]),
        ("crop", [math.nan, 0.0, 8.0, 10.0]),
    ],
)
def test_a_crop_or_reach_beside_the_image_is_refused_with_its_row(name, row):
    images, drawn = images_of(3, 8, 10), beside(name, row)
    with pytest.raises(ValueError, match=rf"in its image, 8 x 10, .* for image 1 .*{name} \[{row[0]}"):
        augment_views(images, drawn, size=6, mean=MEAN, std=STD)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_up_to_half_a_pixel_beyond_its_reach_has_pixels_to_read(interpolation):
    drawn = beside("crop", [-0.5, -0.5, 9.0, 11.0])
    views = augment_views(
        images_of(3, 8, 10), drawn, size=200, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation
    )
    assert views.isfinite().all() and views.min() >= 0 and views.max() <= 1


def test_other_parameters_and_images_that_do_not_fit_are_named_too():
    images, drawn = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ViewParameters.unchanged(1, 8, 8)
    options = {"mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\) uint8, found \(8,\)"):
        color_views(torch.zeros(8, dtype=torch.uint8), drawn, **options)
    with pytest.raises(ValueError, match="order must hold columns of factors, 0 to 3, found 7"):
        color_views(
            images, ViewParameters(**(vars(drawn) | {"order": torch.tensor([[0, 7, 1, 2]])})), **options
        )
    with pytest.raises(ValueError, match="no implementation='reference' in batch"):
        augment_views(images, drawn, size=4, **options, implementation="reference")
