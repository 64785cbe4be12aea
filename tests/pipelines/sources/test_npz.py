"""Images from an .npz: every shape that is accepted, every mistake that is named."""

import zipfile

import numpy as np
import pytest

from fastgessl.pipelines import DataError, open_images
from fastgessl.pipelines.sources import npz

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def saved(tmp_path, **arrays):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("images", [RGB, RGB[..., :1], RGB[..., 0]], ids=["NHWC", "NHW1", "NHW"])
def test_images_come_as_rgb(tmp_path, images):
    found = open_images("npz", saved(tmp_path, train_x=images))
    expected = RGB if images.ndim == 4 and images.shape[3] == 3 else np.stack([RGB[..., 0]] * 3, axis=3)
    assert (
        (found.images == expected).all()
        and found.images.flags.writeable
        and found.labels is None
        and found.classes == ()
    )


def test_labels_splits_and_class_names_are_read(tmp_path):
    path = saved(
        tmp_path,
        train_x=RGB,
        train_y=np.array([0, 1, 0, 1, 0, 1], np.uint8),
        test_x=RGB[:2],
        test_y=np.array([[2], [0]]),
    )
    train, test = open_images("npz", path), open_images("npz", path, "test")
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1] and train.labels.dtype == np.int64
    assert (
        test.labels.tolist() == [2, 0] and len(test) == 2 and train.classes == test.classes == ("0", "1", "2")
    )
    named = saved(tmp_path, train_x=RGB, train_y=np.zeros(6, int), classes=np.array(["cat", "dog"]))
    assert open_images("npz", named).classes == ("cat", "dog")


def test_a_file_without_test_images_has_no_test_split(tmp_path):
    assert open_images("npz", saved(tmp_path, train_x=RGB), "test") is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": RGB}, r"holds no images: train_x is missing \(found x\)"),
        ({"test_x": RGB}, "train_x is missing"),
        ({"train_x": RGB / 255}, "train_x must be uint8 .*found float64"),
        ({"train_x": RGB.astype(np.int64)}, "train_x must be uint8 .*found int64"),
        ({"train_x": RGB[0, 0]}, r"train_x must be \(N, H, W\), .*found \(4, 3\)"),
        ({"train_x": np.repeat(RGB, 2, axis=3)}, r"found \(6, 5, 4, 6\)"),
        ({"train_x": RGB.transpose(0, 3, 1, 2)}, r"found \(6, 3, 5, 4\). Transpose"),
        ({"train_x": RGB[:0]}, "train_x holds no images"),
        ({"train_x": RGB, "train_y": np.zeros(5, int)}, "train_y has 5 labels for the 6 images"),
        ({"train_x": RGB, "train_y": np.zeros(6)}, r"train_y must be \(N,\) integers, found \(6,\) float64"),
        ({"train_x": RGB, "train_y": np.zeros((6, 2), int)}, r"train_y must be \(N,\) integers"),
        ({"train_x": RGB, "train_y": np.array(0)}, r"train_y must be \(N,\) integers"),
        ({"train_x": RGB, "train_y": np.full(6, -1)}, "train_y holds the label -1"),
        ({"train_x": np.array([None, RGB], dtype=object)}, "cannot be read as an .npz of plain arrays"),
        ({"train_x": RGB, "train_y": np.full(6, 2**62)}, "train_y holds the label 4611686018427387904"),
        ({"train_x": RGB, "train_y": np.full(6, 3), "classes": np.array(["a"])}, "labels go up to 3"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, arrays, message):
    path = saved(tmp_path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        open_images("npz", path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_no_npz_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        open_images("npz", tmp_path / "absent.npz")
    with pytest.raises(DataError, match="is not a file"):
        open_images("npz", tmp_path)
    whole = saved(tmp_path, train_x=RGB).read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + bytes(20) + whole[220:]):
        path = tmp_path / "broken.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as an \.npz"):
            open_images("npz", path)
    np.save(tmp_path / "one.npy", RGB)
    with pytest.raises(DataError, match="holds one array"):
        open_images("npz", tmp_path / "one.npy")


def test_a_member_that_is_no_array_is_named(tmp_path):
    path = saved(tmp_path, train_x=RGB)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_y.npy", b"no array at all")
    with pytest.raises(DataError, match="train_y is no array"):
        open_images("npz", path)


def test_an_archive_larger_than_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, train_x=np.zeros((64, 64, 64), np.uint8))
    assert path.stat().st_size < 64**3 / 100
    monkeypatch.setattr(npz, "_memory", lambda: 64**3 - 1)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("was unpacked"))
    with pytest.raises(DataError, match="more than this machine's memory"):
        open_images("npz", path)
