"""What an encoded image says of itself before it is decoded, and its picture by Pillow."""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastgessl.pipelines.sources import DataError

# MPO is what phones write: a JPEG with further pictures behind it.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of these the sides change places. Numbers beyond 8 mean nothing, and DALI takes them for upright as well.
_TURNED = (5, 6, 7, 8)
BROKEN = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def image_size(encoded: NDArray[np.uint8], name: str) -> tuple[int, int]:
    """Height and width of the upright picture, EXIF orientation applied. Raises DataError if it is not one of
    the formats read here.
    """
    image, orientation = _open(encoded, name)
    width, height = image.size
    return (width, height) if orientation in _TURNED else (height, width)


def decode(encoded: NDArray[np.uint8], name: str) -> Image.Image:
    """The upright RGB picture, decoded by Pillow. Raises DataError, naming the file, if it cannot be."""
    image, orientation = _open(encoded, name)
    try:
        pixels = as_rgb(image)
    except BROKEN as error:
        raise DataError(
            f"image {name!r} is damaged ({error}). Remove it from the data set, or replace it."
        ) from error
    return pixels.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else pixels


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB. Pillow's own conversion clips 16-bit grey at 255; its high byte is the picture."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _open(encoded: NDArray[np.uint8], name: str) -> tuple[Image.Image, int]:
    """The picture, not decoded yet, and its EXIF orientation."""
    content = encoded.tobytes()
    try:
        image = Image.open(io.BytesIO(content))
        if image.format == "PNG" and "exif" not in image.info and b"eXIf" in content:
            # A PNG may say which side is up after its pixels; Pillow finds that by decoding them.
            image.load()
    except BROKEN as error:
        raise DataError(
            f"image {name!r} is not an image that can be read ({type(error).__name__}; it begins with "
            f"{content[:8]!r}). "
            "Remove it from the data set, or replace it."
        ) from error
    if image.format not in _FORMATS:
        raise DataError(
            f"image {name!r} is a {image.format} file, not JPEG, PNG, WebP or BMP. Convert it, or remove it "
            "from the data set."
        )
    return image, _orientation(image.info.get("exif", b""))


def _orientation(block: bytes) -> int:
    """As it is written; 1, upright, if the EXIF block is absent or broken, as DALI has it. XMP, which DALI
    does not read, is left aside.
    """
    exif = Image.Exif()
    try:
        exif.load(block)
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, struct.error):
        return 1
