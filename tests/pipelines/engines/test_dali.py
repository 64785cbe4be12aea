"""The DALI engine against torchvision's functions with the same draws, on files of every kind."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")

from PIL import Image

from fastgessl.pipelines import (
    ArrayImages,
    DataError,
    FileImages,
    ViewSpec,
    build,
    evaluation_view,
    open_images,
    view_preset,
)
from fastgessl.pipelines.decode import image_size

HALF = (0.5, 0.5, 0.5)
GEOMETRY = {"mean": HALF, "std": HALF, "jitter_probability": 0.0}


def batches(images, views, engine, **options):
    loader = build(images, views, **({"engine": engine, "batch_size": 4, "seed": 1, "workers": 1} | options))
    found = list(loader)
    loader.close()
    return found


def difference(images, views, engine="dali", **options):
    """|engine - torchvision| of all views, grey levels of 255."""
    ours, theirs = (batches(images, views, each, **options) for each in (engine, "torchvision"))
    assert [batch.index.tolist() for batch in ours] == [batch.index.tolist() for batch in theirs] and ours
    return [
        torch.cat([(a.views[number] - b.views[number]).abs() for a, b in zip(ours, theirs, strict=True)])
        * 127.5
        for number in range(len(ours[0].views))
    ]


STILL = {"size": 24, "mean": HALF, "std": HALF, "flip_probability": 0.0, "jitter_probability": 0.0}
ALWAYS = STILL | {"jitter_probability": 1.0}
RECIPES = {
    "bilinear crop": (ViewSpec(size=24, **GEOMETRY),),
    "bicubic crop": (ViewSpec(size=24, interpolation="bicubic", **GEOMETRY),),
    "evaluation": (evaluation_view(24, mean=HALF, std=HALF),),
    "flip": (ViewSpec(**STILL | {"flip_probability": 1.0}),),
    "brightness": (ViewSpec(**ALWAYS, brightness=0.8),),
    "contrast": (ViewSpec(**ALWAYS, contrast=0.8),),
    "saturation": (ViewSpec(**ALWAYS, saturation=0.8),),
    "hue": (ViewSpec(**ALWAYS, hue=0.5),),
    "grayscale": (ViewSpec(**STILL, grayscale_probability=1.0),),
    "blur": (ViewSpec(**STILL, blur_probability=1.0, blur_kernel=5),),
    "solarize": (ViewSpec(**STILL, solarize_probability=1.0),),
    **{
        name: view_preset(name, 24, mean=HALF, std=HALF)
        for name in ("simclr", "moco", "byol", "swav", "dino", "dissl")
    },
}
# Grey levels of 255: the mean over a view, and the largest difference without the outermost pixels. Both
# round the crop to bytes, which colour may enlarge; of a small view the outermost pixels, where DALI repeats
# the crop's border and torchvision takes fewer taps, are a larger share.
ALLOWED = {
    "bilinear crop": (0.3, 1.01),
    "bicubic crop": (0.4, 10),
    "evaluation": (0.3, 1.01),
    "flip": (0.3, 1.01),
    "brightness": (0.25, 2.5),
    "contrast": (0.3, 2.5),
    "saturation": (0.3, 3),
    "hue": (0.35, 4),
    "grayscale": (0.25, 1.5),
    "blur": (0.25, 5),
    "solarize": (0.3, 1.01),
    "simclr": (0.3, 4),
    "moco": (0.3, 4),
    "byol": (0.35, 10),
    "swav": (0.7, 9),
    "dino": (0.8, 18),
    "dissl": (0.3, 9),
}
LARGEST_AT_BORDER = 32


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_of_files_equal_torchvisions(photos, recipe):
    mean, largest = ALLOWED[recipe]
    for number, found in enumerate(difference(open_images("folder", photos), RECIPES[recipe])):
        inner = found[:, :, 1:-1, 1:-1]
        print(
            f"{recipe:14s} view {number}: mean {found.mean():.2f}, max {found.max():.1f}, max without the "
            f"border {inner.max():.1f} of 255"
        )
        assert found.mean() < mean and inner.max() < largest and found.max() < LARGEST_AT_BORDER
        assert inner.median() <= 0.51


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_of_arrays_by_the_resident_engine_equal_torchvisions(picture, recipe):
    # Shifted pictures: edges in other places, and the same colours.
    images = ArrayImages(
        np.stack([np.roll(picture, (5 * shift, 9 * shift), axis=(0, 1)) for shift in range(8)])
    )
    for number, found in enumerate(difference(images, RECIPES[recipe], engine="resident")):
        print(f"{recipe:14s} view {number}: mean {found.mean():.2f}, max {found.max():.1f} of 255")
        assert found.mean() < 0.45 and found.max() < 5


def assert_shown_alike(folder, content):
    path = folder / "käfer 1.jpg"
    path.write_bytes(content)
    (found,) = difference(FileImages((path,)), (ViewSpec(size=16, **GEOMETRY),), batch_size=1)
    assert found[:, :, 1:-1, 1:-1].max() <= 2.01


@pytest.mark.parametrize("kind", ["grey", "cmyk", "palette", "rgba", "16-bit", "webp", "bmp", "1x1"])
def test_unusual_files_decode_as_torchvision_shows_them(tmp_path, picture, encode, kind):
    image = Image.fromarray(picture)
    content = {
        "grey": lambda: encode(image.convert("L"), "JPEG"),
        "cmyk": lambda: encode(image.convert("CMYK"), "JPEG"),
        "palette": lambda: encode(image.convert("P"), "PNG"),
        "rgba": lambda: encode(image.convert("RGBA"), "PNG"),
        "16-bit": lambda: encode(picture[..., 0].astype(np.uint16) * 257, "PNG"),
        "webp": lambda: encode(image, "WEBP", lossless=True),
        "bmp": lambda: encode(image, "BMP"),
        "1x1": lambda: encode(picture[:1, :1], "PNG"),
    }[kind]()
    assert_shown_alike(tmp_path, content)


def behind_the_pixels(png: bytes) -> bytes:
    """Moves the eXIf chunk of a PNG to its end, where the standard allows it too."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, late", "WEBP"])
@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7, 8, 9, "broken"])
def test_pictures_stand_upright(tmp_path, picture, encode, kind, orientation):
    tags = Image.Exif()
    tags[0x0112] = 6 if orientation == "broken" else orientation
    block = tags.tobytes()
    if orientation == "broken":
        block = block[:6] + b"garbage!" * 4
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(picture, kind.split(",")[0], exif=block, **options)
    assert_shown_alike(tmp_path, behind_the_pixels(content) if kind == "PNG, late" else content)


@pytest.mark.parametrize("stated", [(80, 60), (600, 800), (30, 40)])
def test_a_picture_of_another_size_than_its_header_says_is_shown_as_it_is(photos, monkeypatch, stated):
    images = open_images("folder", photos)
    odd, size = str(images.paths[5]), image_size
    monkeypatch.setattr(
        "fastgessl.pipelines.engines.dali.image_size",
        lambda encoded, name: stated if name == odd else size(encoded, name),
    )
    for views in (RECIPES["evaluation"], RECIPES["bilinear crop"]):
        expected, found = (
            batches(images, views, engine, training=False) for engine in ("torchvision", "dali")
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.index.tolist() == theirs.index.tolist()
            assert (ours.views[0] - theirs.views[0])[:, :, 1:-1, 1:-1].abs().max() * 127.5 <= 2.01


def test_a_loader_works_again_after_the_bad_file_is_mended(photos):
    images = open_images("folder", photos)
    content = images.paths[5].read_bytes()
    loader = build(images, RECIPES["evaluation"], engine="dali", batch_size=4, training=False, workers=1)
    images.paths[5].write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError):
        list(loader)
    images.paths[5].write_bytes(content)
    assert torch.cat([batch.index for batch in loader]).tolist() == list(range(14))


def test_a_loop_left_early_is_continued(photos):
    images, views = open_images("folder", photos), RECIPES["simclr"]
    whole = batches(images, views, "dali")
    loader = build(images, views, engine="dali", batch_size=4, seed=1)
    first = next(iter(loader))
    assert [batch.index.tolist() for batch in (first, *loader)] == [batch.index.tolist() for batch in whole]


def test_arrays_may_go_through_dali_too():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)
    (found,) = difference(ArrayImages(pixels), (ViewSpec(size=12, **GEOMETRY),))
    assert found[:, :, 1:-1, 1:-1].max() <= 1.01


def test_real_photos_equal_torchvisions(real_photos):
    images = FileImages(real_photos("odd", "val", count=16))
    for found in difference(images, view_preset("simclr", 96, mean=HALF, std=HALF), batch_size=len(images)):
        assert found.mean() < 0.5
