"""`fastgessl views` and `fastgessl prepare`, as a user types them."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_views_are_drawn_as_a_grid_of_images_and_views(fastgessl, tmp_path):
    code, out, _ = fastgessl(
        "views", "digits-simclr", "--images", 3, "--out", tmp_path / "v.png", "--views.local_views", 2
    )
    assert code == 0 and "4 views per image by resident" in out
    picture = np.asarray(Image.open(tmp_path / "v.png"))
    # Three columns of 16 pixels and two of 7, gaps of 4; a line of labels and three rows of 16.
    assert picture.shape == (14 + 4 + 3 * 20, 4 + 3 * 20 + 2 * 11, 3)
    cells = [
        picture[18 + 20 * row : 34 + 20 * row, left : left + 16] for row in range(3) for left in (4, 24, 44)
    ]
    assert all(cell.std() > 0 for cell in cells)
    assert all((first != second).any() for at, first in enumerate(cells) for second in cells[:at])


def test_two_engines_show_the_same_draw(fastgessl, tmp_path):
    pytest.importorskip("torchvision")
    words = (
        "views",
        "digits-byol",
        "--images",
        2,
        "--data.workers",
        1,
        "--out",
        tmp_path / "v.png",
        "--against",
        "torchvision",
    )
    code, out, _ = fastgessl(*words)
    assert code == 0 and "by resident and torchvision" in out
    assert float(out.split("differ by ")[1].split(" of")[0]) < 1
    assert np.asarray(Image.open(tmp_path / "v.png")).shape[0] == 18 + 4 * (16 + 4 + 14)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("views", "digits-simclr", "--out", "v.jpg"), "views are written as .png"),
        (
            ("views", "digits-simclr", "--out", "nowhere/v.png"),
            "the folder 'nowhere' of --out does not exist",
        ),
        (("views", "digits-simclr", "--images", "0"), "--images must be at least 1, found 0"),
        (
            ("views", "digits-simclr", "--views.local_views", "1", "--views.local_size", "40"),
            "local_size must be from 1 to views.size 16",
        ),
        (("views", "digits-simclr", "--against", "dahli"), "data.engine 'dahli' is unknown"),
        (("prepare", "imagenet", "out"), "imagenet is not handed out freely"),
        (("prepare", "nowhere", "out"), "data.root 'nowhere' does not exist"),
        (("prepare", ".", "out", "--per_shard", "0"), "--per_shard must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(fastgessl, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = fastgessl(*words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_prepare_says_what_to_type_next(fastgessl, tmp_path):
    for number in range(3):
        Image.fromarray(np.full((20, 20, 3), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
    code, out, _ = fastgessl("prepare", tmp_path, tmp_path / "out.npz")
    assert (
        code == 0
        and f"3 images written, 0 of them converted, 0 left out. Train on them with --data.name npz "
        f"--data.root {tmp_path}"
        in out
    )
    assert np.load(tmp_path / "out.npz")["train_x"].shape == (3, 20, 20, 3)


def _commands_of_the_data_page():
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()
    return [
        shlex.split(line)[1:]
        for line in re.findall(r"^fastgessl (?:prepare|views) .*", page, flags=re.MULTILINE)
    ]


def test_the_commands_of_the_data_page_do_what_they_say(fastgessl, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        path = tmp_path / "photos" / ("val" if number == 3 else "train") / "cat" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(
            path
        )
    commands = _commands_of_the_data_page()
    assert len(commands) == 5
    for words in commands:
        code, _, err = fastgessl(*words, *(("--data.workers", "1") if words[0] == "views" else ()))
        assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.tar")) == [
        "train-000000.tar",
        "val-000000.tar",
    ]
    assert np.load("small.npz")["train_x"].shape == (3, 64, 64, 3) and Path("views.png").is_file()


def test_training_skips_bad_files_lists_them_and_reads_shards(fastgessl, tmp_path, monkeypatch, recwarn):
    """The whole way: pictures, a bad one among them, into shards; both trained on for two steps with
    multi-crop views.
    """
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(
            path
        )
    path.write_bytes(path.read_bytes()[:200])
    assert fastgessl("prepare", "photos", "shards", "--per_shard", "5").code == 0
    small = shlex.split(
        "--model.width 0.125 --model.stem small --views.size 16 --views.local_views 1 --train.batch_size 6 "
        "--train.max_steps 2 "
        "--method.projector_hidden 8 --method.projector_out 4 --evaluate.tasks geometry --log.trackers "
        "--data.workers 1"
    )
    for root, more in (
        ("photos", ("--data.name", "folder", "--data.bad_files", "skip")),
        ("shards", ("--data.name", "shards")),
    ):
        code, _, err = fastgessl(
            "train", "folder-swav", "--data.root", root, "--train.run_dir", f"run-{root}", *small, *more
        )
        assert code == 0, err
    assert Path("run-photos/bad_files.txt").read_text().splitlines() == [str(Path("photos/b/11.png"))]
    assert not Path("run-shards/bad_files.txt").exists()
