"""Headers: the size of the upright picture, and errors that name the file."""

import numpy as np
import pytest

from fastgessl.pipelines import DataError

pytest.importorskip("PIL.Image")
from PIL import Image

from fastgessl.pipelines.header import blame, decode, image_size, read_encoded


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_of_the_upright_picture(tmp_path, picture, encode, kind, orientation):
    path = tmp_path / "a"
    path.write_bytes(encode(picture, kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {})))
    size = image_size(read_encoded(path), path)
    assert size == ((80, 60) if orientation >= 5 else (60, 80))
    mirrored = picture[:, ::-1] if orientation in (2, 4, 5, 7) else picture
    expected = np.rot90(mirrored, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation])
    found = np.asarray(decode(path)).astype(int)
    assert found.shape[:2] == size and np.abs(found - expected).mean() < (5 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, picture, encode, mode):
    path = tmp_path / "a"
    path.write_bytes(encode(Image.fromarray(picture).convert(mode), "JPEG" if mode == "CMYK" else "PNG"))
    assert np.asarray(decode(path)).shape == (60, 80, 3) and image_size(read_encoded(path), path) == (60, 80)


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path, encode):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    path = tmp_path / "a.png"
    path.write_bytes(encode(ramp, "PNG"))
    assert (np.asarray(decode(path))[..., 0].ravel() == np.arange(256)).all()


def broken_files(picture, encode):
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
    return {
        "empty.jpg": (b"", "is an empty file"),
        "text.jpg": (b"hello, I am no image", "is not an image that can be read"),
        "header.jpg": (jpeg[:150], "is not an image that can be read|is damaged"),
        "gif.jpg": (encode(picture, "GIF"), "is a GIF file, not JPEG, PNG, WebP or BMP"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "is damaged"),
        "truncated.png": (png[: len(png) // 2], "is damaged"),
    }


NAMES = ("empty.jpg", "text.jpg", "header.jpg", "gif.jpg", "truncated.jpg", "truncated.png")


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_file_is_named_in_one_line(tmp_path, picture, encode, name):
    content, message = broken_files(picture, encode)[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        decode(path)
    assert repr(str(path)) in str(caught.value) and "\n" not in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.jpg' cannot be read \(No such file"):
        read_encoded(tmp_path / "absent.jpg")


def test_the_file_on_which_a_decoder_failed_is_found(tmp_path, picture, encode):
    content, _ = broken_files(picture, encode)["truncated.jpg"]
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for path in paths:
        path.write_bytes(encode(picture, "JPEG"))
    assert "one of 3 images" in str(blame(paths, RuntimeError("strange")))
    paths[1].write_bytes(content)
    assert repr(str(paths[1])) in str(blame(paths, RuntimeError("strange")))
