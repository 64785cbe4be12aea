"""Images from a folder: which files, which labels, which errors."""

import os

import pytest

from fastgessl.pipelines import DataError, open_images


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"an image")
    return root


def names(images, root):
    return [path.relative_to(root).as_posix() for path in images.paths]


FOLDERS = {
    "a flat folder": (
        ("b.png", "a.JPG", "c.webp", "d.bmp", "e.jpeg", "notes.txt", "._a.jpg", ".hidden/x.png"),
        {"a.JPG": None, "b.png": None, "c.webp": None, "d.bmp": None, "e.jpeg": None},
    ),
    "a folder per class": (
        ("dog/1.png", "cat/deep/er/2.png", "cat/1.png", "empty/readme.txt"),
        {"cat/1.png": "cat", "cat/deep/er/2.png": "cat", "dog/1.png": "dog"},
    ),
    "one folder": (
        ("photos/1.png", "photos/2.png"),
        {"photos/1.png": None, "photos/2.png": None},
    ),
    "any script": (
        ("käfer/größe 1.png", "蝶/写真.JPG"),
        {"käfer/größe 1.png": "käfer", "蝶/写真.JPG": "蝶"},
    ),
}
"""Files, and those that are images with the names of their classes."""


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_first_of_several_levels_names_the_class(tmp_path, kind):
    files, expected = FOLDERS[kind]
    images = open_images("folder", put(tmp_path, *files))
    classes = [images.classes[label] for label in images.labels] if images.classes else [None] * len(images)
    assert dict(zip(names(images, tmp_path), classes, strict=True)) == expected
    assert (images.labels is None) == (images.classes == ())
    assert open_images("folder", tmp_path, "test") is None


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_held_out_folders_share_their_classes(tmp_path, held_out):
    put(tmp_path, "train/a/1.png", "train/b/1.png", f"{held_out}/b/9.png", "stray.png")
    train, test = open_images("folder", tmp_path), open_images("folder", tmp_path, "test")
    assert names(train, tmp_path) == ["train/a/1.png", "train/b/1.png"]
    assert train.classes == test.classes == ("a", "b") and test.labels.tolist() == [1]


def test_held_out_images_of_unlabelled_training_have_no_labels(tmp_path):
    put(tmp_path, "train/1.png", "train/2.png", "val/a/1.png", "val/b/1.png")
    assert open_images("folder", tmp_path, "test").labels is None


def test_a_held_out_class_that_was_not_trained_on_is_refused(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/c/1.png")
    with pytest.raises(DataError, match="folders c name classes that the training images do not have"):
        open_images("folder", tmp_path, "test")


def test_loose_images_beside_class_folders_give_no_labels_and_a_warning(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png", "preview.png")
    with pytest.warns(UserWarning, match="1 images lie beside 2 folders of images"):
        images = open_images("folder", tmp_path)
    assert len(images) == 3 and images.labels is None and images.classes == ()


def test_an_empty_folder_says_what_was_searched(tmp_path):
    put(tmp_path, "a/readme.txt", "b/movie.mp4")
    with pytest.raises(DataError) as caught:
        open_images("folder", tmp_path)
    expected = (
        "holds no images (searched 3 folders for jpg, jpeg, png, webp, bmp). "
        "Put images there or point --data.root at"
    )
    assert expected in str(caught.value)


def test_a_missing_folder_or_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"does not exist\. Point --data\.root at"):
        open_images("folder", tmp_path / "absent")
    put(tmp_path, "a.png")
    with pytest.raises(DataError, match="is a file"):
        open_images("folder", tmp_path / "a.png")


def test_links_are_followed_and_a_loop_ends(tmp_path):
    put(tmp_path / "real", "x/1.png")
    root = put(tmp_path / "root", "y/1.png")
    os.symlink(tmp_path / "real" / "x", root / "x")
    os.symlink(root, root / "y" / "loop")
    images = open_images("folder", root)
    assert names(images, root) == ["x/1.png", "y/1.png"] and images.classes == ("x", "y")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refuse(folder):
        # Permissions do not stop root, so the refusal is acted.
        if str(folder).endswith("b"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"b' cannot be read \(Permission denied\). Check its permissions"):
        open_images("folder", tmp_path)
