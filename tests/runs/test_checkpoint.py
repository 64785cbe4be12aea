"""Checkpoints are complete or absent, pruned, and never run code."""

import os

import pytest
import torch

from fastgessl.config import UsageError
from fastgessl.runs import checkpoint

# What every checkpoint has, as small as it can be.
STATE = {
    "optimizer": {},
    "scaler": None,
    "loader": {},
    "probe": None,
    "ranks": [],
    "skipped": 0,
}


def test_what_was_saved_is_loaded(tmp_path):
    weights = torch.randn(3, 2)
    saved = checkpoint.save(
        tmp_path, 7, STATE | {"objective": {"weights": weights}, "ranks": [{"step": 1}]}, keep=2
    )
    state = checkpoint.load(saved)
    assert torch.equal(state["objective"]["weights"], weights)
    assert (state["step"], state["ranks"]) == (7, [{"step": 1}])


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 20, 3, 400):
        checkpoint.save(tmp_path, step, {}, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000000020", "step-000000400"]
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "checkpoints" / "step-000000400"


def test_a_kill_while_writing_leaves_the_older_checkpoint_as_the_newest(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {}, keep=2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {}, keep=2)
    monkeypatch.undo()
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "checkpoints" / "step-000000001"
    checkpoint.save(tmp_path, 2, {}, keep=2)
    assert not list((tmp_path / "checkpoints").glob("*.part"))


@pytest.mark.parametrize("resume", ["auto", "elsewhere"])
def test_resume_without_a_checkpoint_is_refused(tmp_path, resume):
    with pytest.raises(UsageError, match="checkpoint"):
        checkpoint.find(tmp_path, resume)


@pytest.mark.parametrize("kept", [1500, 5, 0])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, kept):
    saved = checkpoint.save(tmp_path, 5, STATE | {"objective": {"weights": torch.zeros(1000)}}, keep=1)
    os.truncate(saved / "state.pt", kept)
    with pytest.raises(UsageError, match="step-000000005"):
        checkpoint.load(saved)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        saved = checkpoint.save(tmp_path, 5, STATE | {"objective": {"weight": torch.tensor(value)}}, keep=2)
    assert checkpoint.load(saved)["objective"]["weight"].item() == 2.0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


def test_a_kill_while_replacing_leaves_one_of_the_two_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, STATE | {"objective": {"weight": torch.tensor(1.0)}}, keep=1)
    replace = os.replace
    for killed_before in (True, False):

        def killed(source, target, killed_before=killed_before):
            if not killed_before:
                replace(source, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 5, STATE | {"objective": {"weight": torch.tensor(2.0)}}, keep=1)
        monkeypatch.undo()
        found = checkpoint.find(tmp_path, "auto")
        assert found is not None
        assert checkpoint.load(found)["objective"]["weight"].item() == (1.0 if killed_before else 2.0)


def test_what_was_just_written_is_never_the_one_that_is_deleted(tmp_path):
    for step in (7, 9):
        checkpoint.save(tmp_path, step, {}, keep=2)
    for keep in (2, 1):
        saved = checkpoint.save(tmp_path, 3, {}, keep=keep)
        assert saved in checkpoint.complete(tmp_path)
        assert len(checkpoint.complete(tmp_path)) == keep


def test_a_run_is_never_written_backwards(tmp_path):
    older, newest = (checkpoint.save(tmp_path, step, {}, keep=2) for step in (3, 4))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UsageError, match=r"never written backwards.*another --train.run_dir") as refused:
        checkpoint.find(tmp_path, str(older))
    assert "\n" not in str(refused.value)
    assert checkpoint.find(tmp_path, str(newest)) == newest
    assert checkpoint.find(tmp_path / "elsewhere", str(older)) == older


def test_folders_need_no_flushing_where_the_system_opens_none(tmp_path, monkeypatch):
    """As on Windows, where `os.open` refuses a folder."""
    monkeypatch.delattr(os, "O_DIRECTORY")
    opened = os.open

    def refused(path, *rest, **named):
        if os.path.isdir(path):
            raise PermissionError(path)
        return opened(path, *rest, **named)

    monkeypatch.setattr(os, "open", refused)
    saved = checkpoint.save(tmp_path, 5, {}, keep=1)
    assert checkpoint.complete(tmp_path) == [saved]
