"""Images from a list of files."""

import pytest

from fastgessl.pipelines import DataError, open_images


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_list_of_paths_has_no_labels(tmp_path):
    images = open_images(
        "list", write(tmp_path / "mine.txt", "a.jpg", "", "deep/b 1.png", "/elsewhere/c.jpg")
    )
    assert [str(path) for path in images.paths] == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/deep/b 1.png",
        "/elsewhere/c.jpg",
    ]
    assert (
        images.labels is None
        and images.classes == ()
        and open_images("list", tmp_path / "mine.txt", "test") is None
    )


@pytest.mark.parametrize(
    ("lines", "classes", "labels"),
    [
        ([f"my photo {n}.jpg {n % 3}" for n in range(5)], ("0", "1", "2"), [0, 1, 2, 0, 1]),
        ([f"my photo {n}.jpg\t{n % 3}" for n in range(5)], ("0", "1", "2"), [0, 1, 2, 0, 1]),
        (("my photo 0.jpg\twhite dog", "1.jpg\tcat", "2.jpg\twhite dog"), ("cat", "white dog"), [1, 0, 1]),
        (("my photo 0.jpg\t²", "b.jpg\t1"), ("1", "²"), [1, 0]),
    ],
    ids=["numbers", "numbers behind a tab", "names behind a tab", "what only looks like a number"],
)
def test_what_stands_behind_the_paths_are_classes(tmp_path, lines, classes, labels):
    images = open_images("list", write(tmp_path / "mine.txt", *lines))
    assert images.classes == classes and images.labels.tolist() == labels
    assert images.paths[0] == tmp_path / "my photo 0.jpg"


@pytest.mark.parametrize("held_out", ["val.txt", "test.txt"])
def test_a_folder_of_lists_has_a_held_out_one(tmp_path, held_out):
    write(tmp_path / "train.txt", "1.jpg\tdog", "2.jpg\tcat")
    write(tmp_path / held_out, "3.jpg\tdog")
    assert open_images("list", tmp_path, "test").labels.tolist() == [1] and open_images(
        "list", tmp_path
    ).labels.tolist() == [1, 0]
    write(tmp_path / held_out, "3.jpg\tmouse")
    with pytest.raises(DataError, match="has the classes mouse, which the training images do not have"):
        open_images("list", tmp_path, "test")


@pytest.mark.parametrize("label", ["20211121", "9" * 30, "9" * 5000])
def test_a_number_that_counts_no_classes_is_named_before_it_names_millions(tmp_path, label):
    with pytest.raises(DataError, match=rf"mine.txt' holds the label {label[:8]}.*number the classes from 0"):
        open_images("list", write(tmp_path / "mine.txt", "a.jpg 0", f"b.jpg {label}"))


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train.txt' cannot be read \(No such file"):
        open_images("list", tmp_path)
    with pytest.raises(DataError, match="names no images"):
        open_images("list", write(tmp_path / "a.txt", ""))
    with pytest.raises(DataError, match=r"1 of 2 lines have no label \(first: 'b.jpg'\)"):
        open_images("list", write(tmp_path / "a.txt", "a.jpg 0", "b.jpg"))
