"""Files from anyone: they run no code, write nothing elsewhere, do not swell, and are refused in one line."""

import io
import os
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from programs.fuzz import fuzz
from small_training import run_steps, small_config, start, write_images

from fastgessl import pipelines, runs
from fastgessl.config import Config, UsageError
from fastgessl.recipes import load
from fastgessl.runs import checkpoint


class Runs:
    """Unpickling it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (self.canary.touch, ())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(data, configuration, checkpoint of a trained step)."""
    folder = tmp_path_factory.mktemp("saved")
    config = small_config(write_images(folder), train={"max_steps": 1})
    run_steps(start(config, folder / "run"), folder / "run")
    return config, checkpoint.find(folder / "run", "auto")


def altered(saved, folder: Path, **changes: object) -> Path:
    """The checkpoint with other content in some places; a key given as None-like `...` is left out."""
    state = checkpoint.load(saved[1])
    state = {name: value for name, value in {**state, **changes}.items() if value is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state.pt")
    return folder


CONTENTS = {
    "no objective": {"objective": ...},
    "an objective of numbers": {"objective": {"method.backbone.conv1.weight": 3}},
    "an objective of lists": {"objective": {"a": [1]}},
    "weights of another shape": {"objective": {"method.backbone.conv1.weight": torch.zeros(1)}},
    "an optimiser without groups": {"optimizer": {"state": {}}},
    "an optimiser of strings": {"optimizer": {"state": "x", "param_groups": []}},
    "an optimiser of another model": {
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(7)}}, "param_groups": [{"params": [0]}]}
    },
    "more optimiser states than weights": {"optimizer": {"state": {999: {}}, "param_groups": []}},
    "no place in the data": {"loader": {}},
    "a place before the start": {
        "loader": {"epoch": 0, "iteration": -5, "seed": 0, "batch_size": 8, "images": 48}
    },
    "a place that is a tensor": {
        "loader": {"epoch": torch.tensor(1), "iteration": 0, "seed": 0, "batch_size": 8, "images": 48}
    },
    "generators that are no states": {
        "ranks": [{"torch": 1, "cuda": None, "python": (), "numpy": [], "buffers": {}}]
    },
    "ranks of numbers": {"ranks": [7]},
    "a step that is no number": {"step": "1"},
    "no version": {"format": ...},
    "a newer version": {"format": checkpoint.FORMAT + 1},
    "a version that is a list": {"format": [checkpoint.FORMAT]},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_checkpoint_with_other_content_is_refused_in_one_line(saved, tmp_path, content):
    config, _ = saved
    with pytest.raises(UsageError) as refused:
        start(config, tmp_path / "run", altered(saved, tmp_path / "step-000000001", **CONTENTS[content]))
    assert "\n" not in str(refused.value)
    assert "step-000000001" in str(refused.value)


@pytest.mark.parametrize(
    "change", [{"model": {"name": "resnet10t"}}, {"method": {"name": "byol"}}, {"optim": {"name": "adamw"}}]
)
def test_a_checkpoint_of_another_model_method_or_optimiser_is_refused(saved, tmp_path, change):
    config, folder = saved
    other = small_config(config.data.root, **change)
    with pytest.raises(UsageError, match="belongs to another model or optimizer"):
        start(other, tmp_path, folder)


def test_no_pickle_in_a_checkpoint_runs(saved, tmp_path):
    canary = tmp_path / "canary"
    folder = altered(saved, tmp_path / "step-000000001", probe={"x": Runs(canary)})
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load(folder)
    (folder / "state.pt").write_bytes(pickle.dumps(Runs(canary)))
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load(folder)
    assert not canary.exists()


def test_a_checkpoint_that_swells_is_refused_before_it_does(saved, tmp_path):
    file = tmp_path / "step-000000001" / "state.pt"
    file.parent.mkdir()
    with (
        zipfile.ZipFile(saved[1] / "state.pt") as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            with new.open(name, "w") as member:
                if name.endswith("/data/0"):
                    for _ in range(128):
                        member.write(bytes(1 << 20))
                else:
                    member.write(old.read(name))
    assert file.stat().st_size < 4 << 20
    with pytest.raises(UsageError, match=r"cannot be read .ValueError"):
        checkpoint.load(file.parent)


def test_a_tensor_that_claims_more_than_its_file_holds_costs_nothing(saved, tmp_path):
    huge = torch.zeros(1).as_strided((1 << 40,), (0,))  # 4 TB on one number
    state = checkpoint.load(saved[1])["objective"]
    name = next(iter(state))
    folder = altered(saved, tmp_path / "step-000000001", objective=state | {name: huge})
    with pytest.raises(UsageError, match="belongs to another model"):
        start(saved[0], tmp_path / "run", folder)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
TEXTS = {
    "aliases of aliases": BOMB,
    "an alias in a list": BOMB + "evaluate: {tasks: *j}\n",
    "a list that holds itself": "evaluate: {tasks: &t [*t]}",
    "a Python object": "train: !!python/object/apply:os.system ['touch canary']",
    "a deep list": "train: " + "[" * 2000 + "]" * 2000,
    "a number of 10,000 digits": "train: {epochs: " + "9" * 10_000 + "}",
    "a date that is none": "train: {resume: 2001-99-99}",
    "a key that is a list": "? [a]\n: b",
    "a key that is a number": "1: 2",
    "a thousand unknown options": "\n".join(f"option{i}: 1" for i in range(1000)),
    "not a number": "optim: {base_lr: .nan}",
    "words for the terminal": 'recipe: "\\e]0;owned\\a"',
    "half a character": 'recipe: "\\ud800"',
    "a path with a null byte": 'train: {run_dir: "a\\0b"}',
    "bytes": "\udcff\udcfe",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_from_anyone_is_refused_in_one_line_at_once(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    content = TEXTS[text].encode("utf-8", "surrogateescape")
    Path("mine.yaml").write_bytes(content)
    Path("run").mkdir()
    Path("run/config.yaml").write_bytes(content)
    started = time.process_time()
    for read in (lambda: load("mine.yaml"), lambda: runs.read_config("run")):
        with pytest.raises(UsageError) as refused:
            read()
        assert len(str(refused.value)) < 2000
        assert "\n" not in str(refused.value)
    assert time.process_time() - started < 5
    assert sorted(os.listdir()) == ["mine.yaml", "run"]


def test_a_file_that_is_too_large_is_not_even_read(tmp_path):
    with (tmp_path / "mine.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "recipe", ["../../etc/cron.d/x", "/etc/x", "..", ".", "a/b", "~", "$(touch x)", "x" * 500]
)
def test_a_recipe_name_leads_to_no_folder_but_one_under_runs(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    folder = runs.run_folder(Config(recipe=recipe))
    assert folder.parent == Path("runs")
    assert folder.resolve().parent == tmp_path / "runs"
    assert len(folder.name) < 130


def test_a_schedule_of_too_many_steps_is_refused_before_it_is_made(fastgessl, tmp_path):
    outcome = fastgessl(
        "train", "digits-simclr", "--train.epochs", 10**15, "--train.run_dir", tmp_path / "run"
    )
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "max_steps" in outcome.err


def test_a_folder_s_name_says_nothing_to_the_terminal(fastgessl, tmp_path):
    outcome = fastgessl("evaluate", tmp_path / "run\x1b]0;owned\x07\nfastgessl evaluate: all is well")
    assert outcome.code == 2
    assert outcome.err.rstrip("\n").isprintable()


def test_a_log_from_anyone_is_continued_without_its_bad_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2.0}\n'
    path.write_bytes(
        good
        + b'{"step": "2"}\n[1]\n3\nnull\n{"no": 1}\n'
        + b"[" * 5000
        + b"\n\xff\xfe\n"
        + good.replace(b"1", b"9", 1)
    )
    runs.JsonLines(path, 5).close()
    assert path.read_bytes() == good


def test_an_npz_of_objects_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    array = np.empty(1, dtype=object)
    array[0] = Runs(canary)
    np.savez(tmp_path / "images.npz", train_x=array)
    with pytest.raises(pipelines.DataError):
        pipelines.open_images("npz", tmp_path / "images.npz")
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Runs(canary)))
    with pytest.raises(pipelines.DataError):
        pipelines.open_images("npz", tmp_path / "bare.npz")
    assert not canary.exists()


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, b'shape': (1, 8, 8, 3)}",
        b"x\n    1\n  2\n",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3)}",
    ],
    ids=["keys-of-two-types", "indented", "negative"],
)
def test_an_npz_whose_header_is_no_description_is_refused(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr(
            "train_x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(192)
        )
    with pytest.raises(pipelines.DataError, match=r"cannot be read as an \.npz of plain arrays") as refused:
        pipelines.open_images("npz", tmp_path / "images.npz")
    assert "\n" not in str(refused.value)


def test_an_npz_that_asks_for_a_password_is_refused(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, train_x=np.zeros((1, 8, 8, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of encryption, in the directory at the end
    path.write_bytes(content)
    with pytest.raises(pipelines.DataError, match="encrypted"):
        pipelines.open_images("npz", path)


def hostile_tar(path: Path, mode: str, aim: Path) -> None:
    """Members that want out: by an absolute name, by .., by a link and through it, and a device."""
    with tarfile.open(path, mode) as archive:
        for name in (
            str(aim / "absolute.jpg"),
            "../../../../../../../.." + str(aim / "relative.jpg"),
            "inside/../../../escaped.jpg",
        ):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"mine"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(aim)
        archive.addfile(link)
        through = tarfile.TarInfo("link.jpg/through.jpg")
        through.size = 4
        archive.addfile(through, io.BytesIO(b"mine"))
        device = tarfile.TarInfo("device.jpg")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
        archive.addfile(device)


def test_members_of_a_tar_do_not_escape(tmp_path):
    aim, root = tmp_path / "aim", tmp_path / "a" / "b" / "root"
    aim.mkdir()
    root.mkdir(parents=True)
    hostile_tar(root / "images.tar", "w", aim)
    before = sorted(tmp_path.rglob("*"))
    images = pipelines.open_images("shards", root)  # read in place, never unpacked
    assert images is not None
    assert sorted(tmp_path.rglob("*")) == before
    hostile_tar(root / "cifar-10-python.tar.gz", "w:gz", aim)
    with pytest.raises(pipelines.DataError):
        pipelines.open_images("cifar10", root)
    assert list(aim.iterdir()) == []
    assert not (tmp_path / "escaped.jpg").exists()


@pytest.mark.parametrize("seconds", [4.0, pytest.param(3600.0, marks=pytest.mark.slow)])
def test_random_damage_finds_nothing(seconds):
    found = fuzz(seconds, 0, ("recipe", "config", "metrics", "checkpoint", "shard", "npz"))
    print(found)
    assert found["findings"] == {}
    assert found["inputs"] > 100
    assert all(count["refused"] for kind, count in found["by_parser"].items() if kind != "metrics")
