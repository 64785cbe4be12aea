"""Data sets by name: what comes out, and which file is asked for when one is missing."""

import pickle

import numpy as np
import pytest

from fastgessl.pipelines import ArrayImages, DataError, FileImages, open_images


def test_digits_are_scikit_learns_split_once_and_for_all():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = open_images("digits"), open_images("digits", split="test")
    assert isinstance(train, ArrayImages) and isinstance(test, ArrayImages)
    assert (len(train), len(test)) == (1198, 599) and train.images.shape[1:] == (8, 8, 3) and train.images.dtype == np.uint8
    original = datasets.load_digits()
    pixels = np.concatenate([train.images, test.images])[..., 0] / 255 * 16
    labels = np.concatenate([train.labels, test.labels])
    found = sorted((label, *np.rint(image).astype(int).ravel()) for label, image in zip(labels, pixels, strict=True))
    expected = sorted((label, *image.astype(int).ravel()) for label, image in zip(original.target, original.images, strict=True))
    assert found == expected
    # Stratified: every digit is held out in the same share, to within one image.
    counts = np.bincount(test.labels)
    assert np.abs(counts - np.bincount(original.target) / 3).max() <= 1
    assert (open_images("digits", split="test").labels == test.labels).all() and train.classes == tuple("0123456789")


def cifar_batch(path, count, key, seed):
    draw = np.random.default_rng(seed)
    path.write_bytes(
        pickle.dumps({"data": draw.integers(0, 256, (count, 3072), dtype=np.uint8), key: draw.integers(0, 10, count).tolist()})
    )


def test_cifar10_without_its_files_names_the_file_and_the_place(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match=r"holds no whole CIFAR10 .*cifar-10-python\.tar\.gz.*cifar-10-batches-py"):
        open_images("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz"):
        open_images("cifar100", tmp_path)


def test_cifar10_comes_as_torchvision_unpacks_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        cifar_batch(folder / f"data_batch_{number}", 4, "labels", number)
    cifar_batch(folder / "test_batch", 3, "labels", 6)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{number}" for number in range(10)]}))
    # The checksums are those of the real files.
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, test = open_images("cifar10", tmp_path), open_images("cifar10", tmp_path, split="test")
    assert train.images.shape == (20, 32, 32, 3) and len(test) == 3 and train.classes[3] == "class3"
    first = pickle.loads((folder / "data_batch_1").read_bytes())
    assert (train.images[0].transpose(2, 0, 1).ravel() == first["data"][0]).all() and train.labels[0] == first["labels"][0]


def test_imagenet_wants_a_train_folder(tmp_path):
    with pytest.raises(DataError, match=r"has no folder 'train'. Put the photos at train/<class>/\*\.JPEG"):
        open_images("imagenet", tmp_path)
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    (tmp_path / "train" / "n01440764" / "a.JPEG").write_bytes(b"x")
    assert isinstance(open_images("imagenet", tmp_path), FileImages) and open_images("imagenet", tmp_path, "test") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit",), "data.name 'digit' is unknown. Choose one of digits, npz, folder"),
        (("npz",), "data.name npz needs files, but data.root is empty"),
        (("digits", None, "validation"), "split must be train or test, found 'validation'"),
    ],
)
def test_names_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        open_images(*arguments)
