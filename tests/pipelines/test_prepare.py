"""`prepare`: folders into shards and arrays, resumed, converted, and what could not be read named."""

import io
import os
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL.Image")
from PIL import Image

from fastgessl.pipelines import DataError, open_images
from fastgessl.pipelines.decode import decode
from fastgessl.pipelines.prepare import picture, prepare_folder
from fastgessl.pipelines.sources.named import fetch


def prepare(folder, out, *, size=0, per_shard=4, track=lambda work, _: work):
    return prepare_folder(folder, out, size=size, per_shard=per_shard, track=track)


def changed(folder):
    """When each file but the names of the classes was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "classes.txt"}


def test_shards_hold_the_files_as_they_are_with_their_labels(photos, tmp_path):
    report = prepare(photos, tmp_path / "out")
    files, images = open_images("folder", photos), open_images("shards", tmp_path / "out")
    assert (report.written, report.converted, report.left_out) == (14, [], {}) and len(images.shards) == 4
    assert images.classes == files.classes == ("cat", "dog") and (images.labels == files.labels).all()
    assert all((images.read(number) == files.read(number)).all() for number in range(14))


def test_held_out_images_go_into_shards_of_their_own(photos, tmp_path):
    (tmp_path / "all" / "test" / "dog").mkdir(parents=True)
    photos.rename(tmp_path / "all" / "train")
    sample = next((tmp_path / "all" / "train" / "dog").iterdir())
    shutil.copy(sample, tmp_path / "all" / "test" / "dog")
    prepare(tmp_path / "all", tmp_path / "out")
    test = open_images("shards", tmp_path / "out", "test")
    assert len(open_images("shards", tmp_path / "out")) == 14 and test.labels.tolist() == [1]
    assert test.read(0).tobytes() == sample.read_bytes()


def test_an_interrupted_call_goes_on_where_it_was(photos, tmp_path):
    def until_the_third(work, _):
        yield from islice(work, 2)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(photos, out, track=until_the_third)
    (out / "train-000002.tar.part").write_bytes(b"half a shard")
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(first) == ["train-000000.tar", "train-000001.tar"]
    assert prepare(photos, out).written == len(open_images("shards", out)) == 14
    assert changed(out).items() >= first.items()


def test_a_call_over_a_whole_set_reports_what_lies_there(photos, picture_of, encode, tmp_path):
    (photos / "cat" / "a.tiff").write_bytes(encode(picture_of(100), "TIFF"))
    for name in ("dog/y.jpg", "dog/z.jpg"):
        (photos / name).write_bytes(b"no picture")
    first = prepare(photos, tmp_path / "out")
    written = changed(tmp_path / "out")
    again = prepare(photos, tmp_path / "out")
    assert (first.written, len(first.converted), len(first.left_out)) == (15, 1, 2) and again == first
    assert changed(tmp_path / "out") == written
    next((tmp_path / "out").glob("train-*.tar")).write_bytes(b"torn" * 200)
    with pytest.raises(DataError, match=r"train-\d+.tar' of a call before cannot be read"):
        prepare(photos, tmp_path / "out")


def test_a_kill_within_the_record_of_the_pictures_costs_nothing(photos, tmp_path, monkeypatch):
    write = Path.write_bytes

    def torn(self, content):
        write(self, content[: len(content) // 2] if self.name.startswith("train.txt") else content)
        if self.name.startswith("train.txt"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", torn)
        prepare(photos, tmp_path / "out")
    assert prepare(photos, tmp_path / "out").written == 14


def test_names_need_not_be_utf8(photos, tmp_path):
    os.rename(photos / "cat", os.fsencode(photos) + b"/caf\xe9")
    (photos / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.jpg")).write_bytes(b"no picture")
    for out, name in (("out", "shards"), ("out.npz", "npz")):
        report = prepare(photos, tmp_path / out, size=8)
        images = open_images(name, tmp_path / out)
        assert images.classes == (os.fsdecode(b"caf\xe9"), "dog") and report.written == len(images) == 14
        assert [os.fsencode(path)[-5:] for path in report.left_out] == [b"\xff.jpg"]


def test_shards_of_other_pictures_are_not_mixed_in(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    with pytest.raises(DataError, match="holds work on other pictures, or with other options"):
        prepare(photos, tmp_path / "out", per_shard=5)
    next(photos.rglob("*.png")).unlink()
    with pytest.raises(DataError, match="Remove it, or write elsewhere"):
        prepare(photos, tmp_path / "out")


def test_formats_that_dali_does_not_read_are_converted_and_bad_files_named(
    photos, picture_of, encode, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name, kind in (("a.tiff", "TIFF"), ("b.gif", "GIF"), ("c.avif", "AVIF")):
        (photos / "cat" / name).write_bytes(encode(picture_of(100), kind))
    (photos / "cat" / "z.heic").write_bytes(b"not decodable without pillow-heif")
    (photos / "dog" / "z.jpg").write_bytes(b"")
    report = prepare(photos, tmp_path / "out")
    assert (report.written, len(report.converted)) == (17, 3)
    assert sorted(name.rsplit("/", 1)[1] for name in report.left_out) == ["z.heic", "z.jpg"]
    reason = (
        f"image {str(photos / 'cat' / 'z.heic')!r} cannot be converted (Pillow does not know its format). "
        "Install pillow-heif, and"
    )
    assert report.left_out[str(photos / "cat" / "z.heic")].startswith(reason)
    assert len((tmp_path / "out" / "left_out.txt").read_text().splitlines()) == 2
    images = open_images("shards", tmp_path / "out")
    assert len(images) == 17 and (images.labels == 0).sum() == 10
    level = np.asarray(decode(images.read(7), images.name(7)))
    assert images.names[7] == "000000007.jpg" and np.abs(level.astype(int) - 100).max() <= 2


@pytest.fixture
def plugin(monkeypatch):
    """A format that Pillow learns from a plugin, as it learns HEIC from pillow-heif: a word, then a PNG."""
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})

    def opened(file, _):
        file.seek(len(b"INVENTED"))
        return Image.open(io.BytesIO(file.read()))

    Image.register_open("INVENTED", opened, lambda head: head.startswith(b"INVENTED"))


@pytest.mark.usefixtures("plugin")
def test_a_format_that_a_plugin_of_pillow_opens_is_converted(tmp_path, picture, encode):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.heic").write_bytes(b"INVENTED" + encode(picture, "PNG"))
    (tmp_path / "in" / "b.png").write_bytes(encode(picture, "PNG"))
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert report.converted == [str(tmp_path / "in" / "a.heic")] and report.left_out == {}
    shown = open_images("shards", tmp_path / "out")
    converted = np.asarray(decode(shown.read(0), shown.name(0))).astype(int)
    assert converted.shape == picture.shape and np.abs(converted - picture).mean() < 6
    prepare(tmp_path / "in", tmp_path / "out.npz")
    arrays = open_images("npz", tmp_path / "out.npz").images
    assert (arrays == picture).all() and len(arrays) == 2


@pytest.fixture
def picture_of():
    return lambda level: np.full((20, 30, 3), level, np.uint8)


def test_a_folder_says_what_prepare_could_convert(photos, encode, picture_of):
    (photos / "cat" / "a.tiff").write_bytes(encode(picture_of(1), "TIFF"))
    with pytest.warns(
        UserWarning,
        match=r"photos: Files of formats that are not read here: cat/a.tiff. `fastgessl prepare FOLDER OUT` "
        r"converts",
    ):
        assert len(open_images("folder", photos)) == 14
    for name in ("b.HEIC", "c.heif", "d.jxl"):
        (photos / "dog" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="not read here: cat/a.tiff, dog/b.HEIC, dog/c.heif and 1 more"):
        assert len(open_images("folder", photos)) == 14
    for path in (*photos.rglob("*.jpeg"), *photos.rglob("*.png")):
        path.unlink()
    with pytest.raises(
        DataError, match=r"holds no images .* not read here: cat/a.tiff, dog/b.HEIC, dog/c.heif and 1 more"
    ):
        open_images("folder", photos)


def test_arrays_are_cropped_to_one_size(photos, tmp_path):
    report = prepare(photos, tmp_path / "out.npz", size=24)
    images, files = open_images("npz", tmp_path / "out.npz"), open_images("folder", photos)
    assert report.written == 14 and images.images.shape == (14, 24, 24, 3)
    assert (images.labels == files.labels).all() and images.classes == ("cat", "dog")
    whole = decode(files.read(3), "3")
    side = min(whole.size)
    left, top = (whole.width - side) / 2, (whole.height - side) / 2
    expected = whole.resize((24, 24), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    assert np.abs(images.images[3].astype(int) - np.asarray(expected)).max() <= 1


def test_arrays_of_several_sizes_want_a_size(photos, tmp_path):
    with pytest.raises(
        DataError,
        match=r"the pictures are of several sizes, such as \d+x\d+ and \d+x\d+ \(.*\). Give one with --size",
    ):
        prepare(photos, tmp_path / "out.npz")
    assert list(tmp_path.glob("out*")) == []


def test_arrays_of_no_readable_picture_name_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"not one of the train pictures can be read; the last one: image .*a.png"
    ):
        prepare(tmp_path, tmp_path / "out.npz", size=8)
    assert list(tmp_path.glob("out*")) == []


def test_interrupted_arrays_leave_nothing_that_looks_whole(photos, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.replace", interrupted)
        prepare(photos, tmp_path / "out.npz", size=24)
    assert not (tmp_path / "out.npz").exists()
    assert prepare(photos, tmp_path / "out.npz", size=24).written == 14


def test_a_picture_stands_upright_and_keeps_sixteen_bits(encode, picture_of):
    tags = Image.Exif()
    tags[0x0112] = 6
    rotated = np.frombuffer(encode(picture_of(1), "TIFF", exif=tags), np.uint8)
    assert picture(rotated, "a").size == (20, 30)
    deep = np.frombuffer(encode(np.full((4, 4), 200 * 257, np.uint16), "TIFF"), np.uint8)
    assert np.asarray(picture(deep, "a")).max() == 200


def test_a_download_that_fails_says_what_to_put_where(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")

    def refuse(*_, **__):
        raise OSError("the network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(
        DataError,
        match=r"cifar10 could not be downloaded .* Put cifar-10-python.tar.gz of https://.* into '.*' "
        "and run",
    ):
        fetch("cifar10", tmp_path)
    with pytest.raises(
        DataError, match=r"tinyimagenet could not be downloaded .* Put http://cs231n.*zip into"
    ):
        fetch("tinyimagenet", tmp_path)
