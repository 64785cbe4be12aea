"""Data sets by name: what comes out, and which file is asked for when one is missing."""

import json
import pickle
import re

import numpy as np
import pytest

from fastgessl.pipelines import ArrayImages, DataError, open_images
from fastgessl.pipelines.sources.named import IMAGENET100, SETS


def test_digits_are_scikit_learns_split_once_and_for_all():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = open_images("digits"), open_images("digits", split="test")
    assert isinstance(train, ArrayImages) and isinstance(test, ArrayImages)
    assert (
        (len(train), len(test)) == (1198, 599)
        and train.images.shape[1:] == (8, 8, 3)
        and train.images.dtype == np.uint8
    )
    original = datasets.load_digits()
    pixels = np.concatenate([train.images, test.images])[..., 0] / 255 * 16
    labels = np.concatenate([train.labels, test.labels])
    found = sorted(
        (label, *np.rint(image).astype(int).ravel()) for label, image in zip(labels, pixels, strict=True)
    )
    expected = sorted(
        (label, *image.astype(int).ravel())
        for label, image in zip(original.target, original.images, strict=True)
    )
    assert found == expected
    # Stratified: every digit is held out in the same share, to within one image.
    assert np.abs(np.bincount(test.labels) - np.bincount(original.target) / 3).max() <= 1
    assert (open_images("digits", split="test").labels == test.labels).all() and train.classes == tuple(
        "0123456789"
    )


def cifar_batch(path, count, key, seed):
    draw = np.random.default_rng(seed)
    path.write_bytes(
        pickle.dumps(
            {
                "data": draw.integers(0, 256, (count, 3072), dtype=np.uint8),
                key: draw.integers(0, 10, count).tolist(),
            }
        )
    )


@pytest.mark.parametrize("name", [*SETS, "tinyimagenet", "imagenet", "imagenet100"])
def test_without_its_files_a_data_set_says_which_belongs_where(tmp_path, name, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *_, **__: pytest.fail("something was to be downloaded")
    )
    wanted = {
        "cifar10": "unpacked folder cifar-10-batches-py there; or put cifar-10-python.tar.gz of https://",
        "cifar100": "unpacked folder cifar-100-python there; or put cifar-100-python.tar.gz of https://",
        "stl10": "unpacked folder stl10_binary there; or put stl10_binary.tar.gz of http://",
        "stl10_unlabeled": "unpacked folder stl10_binary there; or put stl10_binary.tar.gz of http://",
        "flowers102": "flowers-102/102flowers.tgz, flowers-102/imagelabels.mat and flowers-102/setid.mat of "
        "https://",
        "food101": "unpacked folder food-101 there; or put food-101.tar.gz of http://",
        "aircraft": "unpacked folder fgvc-aircraft-2013b there; or put "
        "fgvc-aircraft-2013b.tar.gz of https://",
        "tinyimagenet": "Put the folder tiny-imagenet-200 there, unpacked from http://",
        "imagenet": "Put the photos at train/<class>/*.JPEG and val/<class>/*.JPEG under it",
        "imagenet100": "Put the photos at train/<class>/*.JPEG and val/<class>/*.JPEG under it",
    }[name]
    with pytest.raises(DataError, match=re.escape(wanted)) as caught:
        open_images(name, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert (
        "imagenet1" in name
        or name == "imagenet"
        or f"`fastgessl prepare {name} {tmp_path}`" in str(caught.value)
    )
    assert list(tmp_path.iterdir()) == []


def test_cifar10_comes_as_torchvision_unpacks_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        cifar_batch(folder / f"data_batch_{number}", 4, "labels", number)
    cifar_batch(folder / "test_batch", 3, "labels", 6)
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class{number}" for number in range(10)]})
    )
    # The checksums are those of the real files.
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, test = open_images("cifar10", tmp_path), open_images("cifar10", tmp_path, split="test")
    assert train.images.shape == (20, 32, 32, 3) and len(test) == 3 and train.classes[3] == "class3"
    first = pickle.loads((folder / "data_batch_1").read_bytes())
    assert (train.images[0].transpose(2, 0, 1).ravel() == first["data"][0]).all() and train.labels[
        0
    ] == first["labels"][0]


def test_stl10_has_its_unlabelled_images_by_a_name_of_their_own(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    draw = np.random.default_rng(0)
    pixels = {
        name: draw.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        for name, count in (("train", 4), ("unlabeled", 7), ("test", 3))
    }
    for name, values in pixels.items():
        # The file has columns before rows.
        (folder / f"{name}_X.bin").write_bytes(values.transpose(0, 1, 3, 2).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 3, 3]))
    (folder / "test_y.bin").write_bytes(bytes([2, 1, 10]))
    (folder / "class_names.txt").write_text("\n".join(f"class{number}" for number in range(10)))
    labelled, unlabelled = open_images("stl10", tmp_path), open_images("stl10_unlabeled", tmp_path)
    assert (labelled.images == pixels["train"].transpose(0, 2, 3, 1)).all() and labelled.labels.tolist() == [
        0,
        9,
        2,
        2,
    ]
    assert labelled.classes[9] == "class9" and unlabelled.labels is None and len(unlabelled) == 11
    assert (unlabelled.images[4:] == pixels["unlabeled"].transpose(0, 2, 3, 1)).all()
    for name in ("stl10", "stl10_unlabeled"):
        assert open_images(name, tmp_path, "test").labels.tolist() == [1, 0, 9]


def test_flowers_train_on_training_and_validation_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    io = pytest.importorskip("scipy.io")
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 102, 1, 2]])})
    io.savemat(folder / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 3]], "tstid": [[5, 6]]})
    train, test = open_images("flowers102", tmp_path), open_images("flowers102", tmp_path, "test")
    assert [path.name for path in train.paths] == [
        "image_00001.jpg",
        "image_00004.jpg",
        "image_00002.jpg",
        "image_00003.jpg",
    ]
    assert (
        train.labels.tolist() == [0, 101, 1, 2]
        and len(train.classes) == 102
        and test.labels.tolist() == [0, 1]
    )


def test_food_and_aircraft_come_as_torchvision_lists_them(tmp_path):
    pytest.importorskip("torchvision")
    meta = tmp_path / "food-101" / "meta"
    meta.mkdir(parents=True)
    (tmp_path / "food-101" / "images").mkdir()
    (meta / "train.json").write_text(
        json.dumps({"waffles": ["waffles/2", "waffles/1"], "apple_pie": ["apple_pie/7"]})
    )
    (meta / "test.json").write_text(json.dumps({"waffles": ["waffles/3"], "apple_pie": []}))
    food = open_images("food101", tmp_path)
    assert food.classes == ("apple_pie", "waffles") and [path.name for path in food.paths] == [
        "2.jpg",
        "1.jpg",
        "7.jpg",
    ]
    assert food.labels.tolist() == [1, 1, 0] and open_images("food101", tmp_path, "test").labels.tolist() == [
        1
    ]
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nDHC-1\n")
    (data / "images_variant_trainval.txt").write_text("1025794 DHC-1\n0056978 707-320\n")
    (data / "images_variant_test.txt").write_text("1 DHC-1\n")
    aircraft = open_images("aircraft", tmp_path)
    assert aircraft.classes == ("707-320", "DHC-1") and aircraft.labels.tolist() == [1, 0]
    assert aircraft.paths[0] == data / "images" / "1025794.jpg" and open_images(
        "aircraft", tmp_path, "test"
    ).labels.tolist() == [1]


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"an image")


@pytest.mark.parametrize("above", [True, False])
def test_tinyimagenets_validation_images_have_their_annotated_classes(tmp_path, above):
    base = tmp_path / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        put(base / "train" / name / "images" / f"{name}_0.JPEG")
        (base / "train" / name / f"{name}_boxes.txt").write_text("x")
    (base / "val" / "images").mkdir(parents=True)
    (base / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    )
    root = tmp_path if above else base
    train, test = open_images("tinyimagenet", root), open_images("tinyimagenet", root, "test")
    assert (
        train.classes == test.classes == ("n01", "n02")
        and train.labels.tolist() == [0, 1]
        and test.labels.tolist() == [1, 0]
    )
    assert test.paths[0] == base / "val" / "images" / "val_0.JPEG"
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn07\n")
    with pytest.raises(DataError, match="does not hold lines of <file> <class>"):
        open_images("tinyimagenet", root, "test")


def test_imagenet100_is_a_known_choice_out_of_imagenet_or_a_folder_of_100_classes(tmp_path):
    assert len(IMAGENET100) == 100 and all(re.fullmatch(r"n\d{8}", name) for name in IMAGENET100)
    others = [f"n{number:08d}" for number in range(3)]
    for name in (*sorted(IMAGENET100), *others):
        put(tmp_path / "train" / name / "1.JPEG")
    assert open_images("imagenet", tmp_path, "test") is None
    for name in (sorted(IMAGENET100)[7], others[0]):
        put(tmp_path / "val" / name / "9.JPEG")
    train, test = open_images("imagenet100", tmp_path), open_images("imagenet100", tmp_path, "test")
    assert train.classes == tuple(sorted(IMAGENET100)) and train.labels.tolist() == list(range(100))
    assert all(
        path.parent.name == train.classes[label]
        for path, label in zip(train.paths, train.labels, strict=True)
    )
    assert test.labels.tolist() == [7] and len(open_images("imagenet", tmp_path)) == 103
    (tmp_path / "train" / sorted(IMAGENET100)[0] / "1.JPEG").unlink()
    with pytest.raises(
        DataError, match="has 102 classes, but 1 of ImageNet-100's are missing, such as n01558993"
    ):
        open_images("imagenet100", tmp_path)
    for name in (sorted(IMAGENET100)[1], sorted(IMAGENET100)[2]):
        (tmp_path / "train" / name / "1.JPEG").unlink()
    assert len(open_images("imagenet100", tmp_path).classes) == 100


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
