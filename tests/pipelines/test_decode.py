"""Headers: the size of the upright picture, and errors that name the file."""

import numpy as np
import pytest

pytest.importorskip("PIL.Image")
from PIL import Image

from fastgessl.pipelines.decode import decode, image_size


def encoded(content):
    return np.frombuffer(content, dtype=np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_of_the_upright_picture(picture, encode, kind, orientation):
    content = encoded(
        encode(picture, kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    )
    size = image_size(content, "a")
    assert size == ((80, 60) if orientation >= 5 else (60, 80))
    mirrored = picture[:, ::-1] if orientation in (2, 4, 5, 7) else picture
    expected = np.rot90(mirrored, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation])
    found = np.asarray(decode(content, "a")).astype(int)
    assert found.shape[:2] == size and np.abs(found - expected).mean() < (5 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_exif_does_not_have_turns_nothing(picture, encode, orientation):
    content = encoded(encode(picture, "PNG", exif=exif(orientation)))
    assert image_size(content, "a") == (60, 80) and (np.asarray(decode(content, "a")) == picture).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(picture, encode, mode):
    content = encoded(encode(Image.fromarray(picture).convert(mode), "JPEG" if mode == "CMYK" else "PNG"))
    assert np.asarray(decode(content, "a")).shape == (60, 80, 3) and image_size(content, "a") == (60, 80)


def test_sixteen_bit_grey_keeps_its_high_byte(encode):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert (np.asarray(decode(encoded(encode(ramp, "PNG")), "a"))[..., 0].ravel() == np.arange(256)).all()
