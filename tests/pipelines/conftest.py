"""Pictures as files of every kind that people have, made here."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def picture():
    """(60, 80, 3) uint8: smooth colours with edges, different along both axes and in every corner."""
    y, x = np.mgrid[:60, :80]
    planes = [
        127 + 120 * np.sin(x / 9 + y / 23),
        127 + 120 * np.cos(y / 7 - x / 31),
        (x * 3) % 256 * (y > 20),
    ]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def encode():
    """encode(pixels or Pillow image, format, **options) -> bytes"""
    images = pytest.importorskip("PIL.Image")

    def encoded(picture, kind: str, **options) -> bytes:
        image = images.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    return encoded


@pytest.fixture
def photos(tmp_path, encode) -> Path:
    """A folder of 14 pictures of different sizes in two classes, JPEG and PNG."""
    draw = np.random.default_rng(0)
    for number in range(14):
        height, width = draw.integers(30, 70, 2)
        coarse = draw.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
        pixels = coarse.repeat(6, axis=0).repeat(6, axis=1)[:height, :width]
        kind = "PNG" if number % 3 == 0 else "JPEG"
        path = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number:02d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, kind, **({"quality": 95} if kind == "JPEG" else {})))
    return tmp_path / "photos"


@pytest.fixture
def real_photos(tmp_path):
    """real_photos(*folders, count=...) -> that many files of a tar of real photos, which is not part of the
    project.
    """
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample_fullsize.tar"
    path = Path(os.environ.get("FASTGESSL_PHOTOS", shared))
    if not path.is_file():
        pytest.skip("no tar of real photos at FASTGESSL_PHOTOS")

    def unpacked(*folders: str, count: int) -> tuple[Path, ...]:
        with tarfile.open(path) as archive:
            files = [member for member in archive.getmembers() if member.isfile()]
            members = [member for member in files if any(f"/{folder}/" in member.name for folder in folders)][
                :count
            ]
            archive.extractall(tmp_path / "real", members, filter="data")
        return tuple(sorted(path for path in (tmp_path / "real").rglob("*") if path.is_file()))

    return unpacked
