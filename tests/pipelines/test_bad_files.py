"""Files that are broken, odd or gone: decoded alike by both engines, or named in one error, or skipped and
listed; never a wrong label.
"""

import os
import struct
import warnings
import zlib
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")

from PIL import Image

from fastgessl.pipelines import DataError, FileImages, ViewSpec, build
from fastgessl.pipelines.bad_files import BadFiles

ENGINES = ("dali", "torchvision")
# Pixel values as they are, so that a view shows which picture it was made of.
VIEW = ViewSpec(size=8, mean=(0, 0, 0), std=(1 / 255,) * 3, crop_scale=(0.5, 1.0), jitter_probability=0.0)
STEP = 20


def sixteen_bit_colour(pixels):
    """A PNG of 16 bits a channel, which Pillow cannot write: (H, W, 3) uint8, each byte twice."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def zeroed(content):
    """Six bytes in the middle lost."""
    middle = len(content) // 2
    return content[:middle] + bytes(6) + content[middle + 6 :]


@pytest.fixture
def pictures(tmp_path, encode):
    """Ten grey pictures of levels 0, 20, …, 180 in three classes: what is shown, and as which class, can be
    read from a view.
    """
    paths = []
    for number in range(10):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(
            encode(np.full((24 + number, 30, 3), STEP * number, np.uint8), "JPEG", quality=95)
        )
    return FileImages(tuple(paths), np.arange(10, dtype=np.int64) % 3, tuple("abc"))


def show(images, engine, **options):
    loader = build(images, [VIEW], **({"engine": engine, "batch_size": 4, "seed": 1, "workers": 1} | options))
    batches = list(loader)
    loader.close()
    for batch in batches:
        levels = (batch.views[0].mean(dim=(1, 2, 3)) / STEP).round().long()
        assert levels.tolist() == batch.index.tolist(), "a view shows another picture than its index says"
        assert (batch.label == batch.index % 3).all()
    return batches, loader


def content_of(kind, level, encode):
    """A file of `kind` whose picture, if it has one, is of this grey level."""
    picture = np.full((40, 30, 3), level, np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    jpeg, png = encode(picture, "JPEG", quality=95), encode(picture, "PNG")
    noise = np.random.default_rng(0).integers(level - 2, level + 3, (64, 64, 3)).astype(np.uint8)
    middle = encode(noise, "JPEG", quality=95)
    return {
        "empty": b"",
        "text": b"no image at all",
        "gif": encode(picture, "GIF"),
        "header only": jpeg[:200],
        "truncated": middle[: len(middle) // 2],
        "without its last byte": jpeg[:-1],
        "truncated png": png[: len(png) // 2],
        "truncated webp": encode(noise, "WEBP")[:-5],
        "zeroed png": zeroed(encode(noise, "PNG")),
        "png without its end": png[:-12],
        "zeroed jpeg": zeroed(middle),
        "png called jpg": png,
        "cmyk": encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95),
        "grey": encode(Image.fromarray(picture).convert("L"), "JPEG", quality=95),
        "16-bit grey": encode(picture[..., 0].astype(np.uint16) * 257, "PNG"),
        "16-bit colour": sixteen_bit_colour(picture),
        "rotated": encode(picture, "JPEG", exif=rotated),
        "1x1": encode(picture[:1, :1], "PNG"),
        "20000x10": encode(np.full((10, 20_000, 3), level, np.uint8), "JPEG"),
        "10x20000": encode(np.full((20_000, 10, 3), level, np.uint8), "JPEG"),
    }[kind]


READABLE = (
    "png without its end",
    "png called jpg",
    "cmyk",
    "grey",
    "16-bit grey",
    "16-bit colour",
    "rotated",
    "1x1",
    "20000x10",
    "10x20000",
)
BROKEN = {
    "empty": "is an empty file",
    "text": "is not an image that can be read",
    "gif": "is a GIF file, not JPEG, PNG, WebP or BMP",
    "header only": "is not an image that can be read|is damaged",
    "truncated": "is damaged",
    "without its last byte": "is damaged",
    "truncated png": "is damaged",
    "truncated webp": "is not an image that can be read",
    "zeroed png": "is damaged",
}
"""Kinds that cannot be shown, and what is said of them."""
NO_FILES = ("absent", "folder", "pipe", "loop of links", "dangling link")


def spoil(path, kind, encode, level):
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop of links":
        path.symlink_to(path.with_suffix(".other"))
        path.with_suffix(".other").symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to(path.with_suffix(".nowhere"))
    elif kind != "absent":
        path.write_bytes(content_of(kind, level, encode))


@pytest.mark.parametrize("kind", READABLE)
def test_an_odd_file_is_shown_by_both_engines(pictures, encode, kind):
    spoil(pictures.paths[7], kind, encode, 7 * STEP)
    for engine in ENGINES:
        batches, loader = show(pictures, engine, training=False)
        assert (
            torch.cat([batch.index for batch in batches]).tolist() == list(range(10))
            and loader.bad_files == []
        )


def test_a_jpeg_with_zeroed_bytes_is_shown_alike_by_both_engines(tmp_path, encode):
    path = tmp_path / "a.jpg"
    path.write_bytes(content_of("zeroed jpeg", 140, encode))
    ours, theirs = (
        next(
            iter(build(FileImages((path,)), [VIEW], engine=engine, batch_size=1, workers=1, training=False))
        ).views[0]
        for engine in ENGINES
    )
    assert (ours - theirs)[..., 1:-1, 1:-1].abs().max() <= 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", (*BROKEN, *NO_FILES))
def test_a_bad_file_is_named_in_one_line(pictures, encode, kind, engine):
    bad = pictures.paths[9]
    spoil(bad, kind, encode, 0)
    with pytest.raises(DataError, match=BROKEN.get(kind)) as caught:
        show(pictures, engine, training=False)
    assert repr(str(bad)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_may_not_be_read_is_named(pictures, monkeypatch, engine):
    bad, opened = pictures.paths[9], Path.open

    def refuse(path, *rest, **options):
        # Permissions do not stop root, so the refusal is acted; forked workers act it too.
        if path == bad:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"image '.*9.jpg' cannot be read \(Permission denied\)"):
        show(pictures, engine, training=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", (*BROKEN, *NO_FILES))
def test_evaluation_leaves_a_bad_file_out(pictures, encode, kind, engine, tmp_path):
    spoil(pictures.paths[5], kind, encode, 0)
    with pytest.warns(UserWarning, match="5.jpg"):
        batches, loader = show(
            pictures, engine, training=False, bad_files="skip", bad_list=tmp_path / "bad_files.txt"
        )
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 6, 7], [8, 9]]
    assert (
        loader.bad_files == (tmp_path / "bad_files.txt").read_text().splitlines() == [str(pictures.paths[5])]
    )


@pytest.fixture
def several(pictures, encode, recwarn):
    """Bad files of every sort, neighbours and the last one among them: 2, 3, 6 and 9."""
    for image, kind in ((2, "truncated"), (3, "text"), (6, "absent"), (9, "truncated png")):
        spoil(pictures.paths[image], kind, encode, 0)
    return pictures


def test_in_training_the_next_good_file_stands_in_with_its_own_label(several, tmp_path):
    expected = {2: 4, 3: 4, 6: 7, 9: 0}
    found = {}
    for engine in ENGINES:
        batches, _ = show(several, engine, bad_files="skip", bad_list=tmp_path / engine)
        requested = build(several, [VIEW], batch_size=4, seed=1, engine="torchvision")._sampling
        for step, batch in enumerate(batches):
            assert batch.index.tolist() == [
                expected.get(image, image) for image in requested.indices(0, step).tolist()
            ]
        found[engine] = [batch.index.tolist() for batch in batches]
        shown = set(requested.indices(0, 0)) | set(requested.indices(0, 1))
        assert sorted((tmp_path / engine).read_text().splitlines()) == [
            str(several.paths[image]) for image in sorted(shown & expected.keys())
        ]
    assert found["dali"] == found["torchvision"] and len(found["dali"]) == 2


def test_a_stand_in_is_drawn_for_the_image_it_replaces(several):
    """Shown in its own right and as a stand-in, a picture has different views: two equal ones would be false
    positives.
    """
    views = [ViewSpec(size=8, mean=(0, 0, 0), std=(1, 1, 1), brightness=0.5, jitter_probability=1.0)]
    for engine in ENGINES:
        loader = build(several, views, engine=engine, batch_size=10, seed=1, workers=1, bad_files="skip")
        (batch,) = loader
        twice = (batch.index == 4).nonzero().flatten()
        levels = batch.views[0].mean(dim=(1, 2, 3))[twice]
        assert len(twice) == 3 and len(levels.unique()) == 3


@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize("engine", ENGINES)
def test_skipping_and_workers_do_not_disturb_resumption(several, engine, stop):
    options = {"engine": engine, "batch_size": 4, "seed": 1, "bad_files": "skip"}
    loader = build(several, [VIEW], **options, workers=1)
    whole = [batch for _ in range(2) for batch in loader]
    first, second = (build(several, [VIEW], **options, workers=workers) for workers in (1, 2))
    seen = list(islice(chain.from_iterable(repeat(first)), stop))
    second.load_state_dict(first.state_dict())
    while second.epoch < 2:
        seen += list(second)
    assert len(seen) == len(whole) == 4
    for found, expected in zip(seen, whole, strict=True):
        assert torch.equal(found.index, expected.index) and torch.equal(found.views[0], expected.views[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_bad_files_alone_is_left_out_of_evaluation(pictures, engine, encode, recwarn):
    for image in (*range(4), 8, 9):
        spoil(pictures.paths[image], "absent" if image % 2 else "truncated", encode, 0)
    batches, loader = show(pictures, engine, training=False, bad_files="skip")
    assert [batch.index.tolist() for batch in batches] == [[4, 5, 6, 7]] and len(loader.bad_files) == 6
    assert [batch.index.tolist() for batch in loader] == [[4, 5, 6, 7]]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_of_bad_files_alone_ends_with_an_error(pictures, engine, encode, recwarn):
    for path in pictures.paths:
        spoil(path, "text", encode, 0)
    with pytest.raises(
        DataError, match=r"not one of the 10 images can be read; the last one: image .* is not an image"
    ):
        show(pictures, engine, bad_files="skip")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_vanishes_while_running_is_skipped_from_then_on(pictures, engine, recwarn):
    loader = build(pictures, [VIEW], engine=engine, batch_size=2, seed=1, workers=1, bad_files="skip")
    list(loader)
    gone = int(loader._sampling.indices(1, 4)[0])
    pictures.paths[gone].unlink()
    shown = torch.cat([batch.index for batch in loader]).tolist()
    assert len(shown) == 10 and gone not in shown and shown.count((gone + 1) % 10) == 2
    assert loader.bad_files == [str(pictures.paths[gone])]


def test_names_may_be_of_any_script(tmp_path, encode):
    names = [
        "käfer größe.jpg",
        "蝶 写真.png",
        "صورة.jpg",
        "emoji 🦋.webp",
        b"not utf-8 \xff.jpg".decode(errors="surrogateescape"),
    ]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encode(np.full((20, 20, 3), STEP * number, np.uint8), "PNG"))
    images = FileImages(
        tuple(tmp_path / name for name in names), np.arange(5, dtype=np.int64) % 3, tuple("abc")
    )
    for engine in ENGINES:
        batches, _ = show(images, engine, batch_size=5, training=False)
        assert batches[0].index.tolist() == list(range(5))
    images.paths[4].write_bytes(b"")
    with pytest.warns(UserWarning):
        show(images, "dali", training=False, bad_files="skip", bad_list=tmp_path / "bad_files.txt")
    assert os.fsencode((tmp_path / "bad_files.txt").read_text(errors="surrogateescape")).endswith(
        b"not utf-8 \xff.jpg\n"
    )


def test_a_listing_names_a_file_once_however_many_write_to_it(pictures, tmp_path):
    ranks = [BadFiles(pictures, skip=True, training=True, listing=tmp_path / "bad") for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for image in (3, 7):
            for rank in ranks:
                rank.add(image, DataError(f"image {image} is bad"))
                rank.announce()
    assert (tmp_path / "bad").read_text().splitlines() == [str(pictures.paths[3]), str(pictures.paths[7])]
    assert len(caught) == 2 and all("image 3 is bad" in str(entry.message) for entry in caught)


def test_another_policy_is_refused(pictures):
    with pytest.raises(DataError, match=r"data.bad_files must be error or skip, found 'ignore'"):
        build(pictures, [VIEW], batch_size=4, bad_files="ignore")
