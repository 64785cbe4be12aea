"""Images from tar shards: what is read, with which labels, and the same views as from files."""

import io
import tarfile

import numpy as np
import pytest
import torch

from fastgessl.pipelines import DataError, build, open_images, view_preset
from fastgessl.pipelines.prepare import prepare_folder


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("engine", ["dali", "torchvision"])
def test_shards_show_what_files_show_and_resume_in_mid_epoch(photos, tmp_path, engine):
    pytest.importorskip({"dali": "nvidia.dali", "torchvision": "torchvision"}[engine])
    prepare_folder(photos, tmp_path / "shards", size=0, per_shard=5)
    files, images = open_images("folder", photos), open_images("shards", tmp_path / "shards")
    views = view_preset("byol", 16, mean=(0.5,) * 3, std=(0.5,) * 3, local_views=1)
    options = {"engine": engine, "batch_size": 4, "seed": 1, "workers": 1}
    of_files = build(files, views, **options)
    expected = [batch for _ in range(2) for batch in of_files]
    ranks = [build(images, views, **options, rank=rank, world_size=2) for rank in range(2)]
    seen = [[next(iter(rank))] for rank in ranks]
    for rank, batches in enumerate(seen):
        resumed = build(images, views, **options, rank=rank, world_size=2)
        resumed.load_state_dict(ranks[rank].state_dict())
        batches += [batch for _ in range(2) for batch in resumed][: len(expected) - 1]
    for whole, *parts in zip(expected, *seen, strict=True):
        assert torch.cat([part.index for part in parts]).tolist() == whole.index.tolist()
        assert torch.cat([part.label for part in parts]).tolist() == whole.label.tolist()
        for number, view in enumerate(whole.views):
            torch.testing.assert_close(
                torch.cat([part.views[number] for part in parts]), view, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("layout", ["{split}/0.tar", "{split}-0.tar"])
@pytest.mark.parametrize("held_out", ["val", "test"])
def test_training_and_held_out_shards_are_told_apart(tmp_path, layout, held_out):
    write_shard(tmp_path / layout.format(split="train"), {"a.jpg": b"1", "b.jpg": b"22"})
    write_shard(tmp_path / layout.format(split=held_out), {"c.jpg": b"333"})
    train, test = open_images("shards", tmp_path), open_images("shards", tmp_path, "test")
    assert train.names == ("a.jpg", "b.jpg") and test.names == ("c.jpg",) and train.labels is None


def test_one_shard_or_a_folder_of_shards_of_any_name_is_for_training(tmp_path):
    write_shard(
        tmp_path / "mine.tar",
        {"x/a.PNG": b"1", "x/a.json": b"{}", "x/a.cls": b"4\n", "y/a.webp": b"2", "y/a.cls": b"0"},
    )
    for root in (tmp_path, tmp_path / "mine.tar"):
        images = open_images("shards", root)
        assert (
            images.names == ("x/a.PNG", "y/a.webp")
            and images.labels.tolist() == [4, 0]
            and images.classes == tuple("01234")
        )
        assert open_images("shards", root, "test") is None


def test_a_long_name_is_kept(tmp_path):
    name = "ordner/" + "käfer" * 40 + ".jpg"
    write_shard(tmp_path / "a.tar", {name: b"content"})
    images = open_images("shards", tmp_path)
    assert images.names == (name,) and images.read(0).tobytes() == b"content"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "hold no jpg, jpeg, png, webp, bmp files"),
        (
            {"a.jpg": b"x", "a.cls": b"0", "b.jpg": b"y"},
            r"1 of 2 images in the shards have no .cls beside them \(first: b.jpg\)",
        ),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls holds no number"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "has the class -1. Number the classes from 0"),
        (
            {"a.jpg": b"x", "a.cls": b"20211121"},
            r"a.tar' holds the label 20211121, .* number the classes from 0",
        ),
        ({"a.jpg": b"x", "a.cls": b"9" * 30}, r"a.tar' holds the label 9999999999"),
        (
            {"a.jpg": b"x", "a.cls": b"2", "classes": b""},
            "the shards have the class 2, but classes.txt names 2 classes",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, members, message):
    write_shard(tmp_path / "a.tar", members)
    if "classes" in members:
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=message):
        open_images("shards", tmp_path)


def test_missing_broken_and_cut_shards_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no tar shards"):
        open_images("shards", tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"a.tar' cannot be read"):
        open_images("shards", tmp_path)
    write_shard(tmp_path / "a.tar", {"a.jpg": bytes(5000), "b.jpg": bytes(5000)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:8000])
    with pytest.raises(DataError, match=r"a.tar' ends within b.jpg"):
        open_images("shards", tmp_path)
    (tmp_path / "a.tar").write_bytes(content)
    images = open_images("shards", tmp_path)
    (tmp_path / "a.tar").write_bytes(content[:8000])
    with pytest.raises(DataError, match=r"a.tar:b.jpg' has \d+ of its 5000 bytes"):
        images.read(1)


def test_an_empty_member_is_an_empty_file(tmp_path):
    write_shard(tmp_path / "a.tar", {"a.jpg": b""})
    with pytest.raises(DataError, match=r"a.tar:a.jpg' is an empty file"):
        open_images("shards", tmp_path).read(0)


def test_thousands_of_samples_keep_their_numbers(tmp_path):
    write_shard(
        tmp_path / "a.tar", {f"{n}.{end}": str(n % 7).encode() for n in range(2000) for end in ("jpg", "cls")}
    )
    images = open_images("shards", tmp_path)
    assert (images.labels == np.arange(2000) % 7).all() and all(
        images.read(n).tobytes() == str(n % 7).encode() for n in range(0, 2000, 199)
    )
