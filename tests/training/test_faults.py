"""Full and read-only disks, deleted folders: the newest complete checkpoint loads, nothing is
overwritten, one line says it.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_training import run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl import runs
from fastgessl.config import UsageError
from fastgessl.runs import checkpoint
from fastgessl.training.log import MetricsLog

QUICK = (
    *("digits-simclr", "--views.size", 8, "--model.width", 0.125, "--method.projector_hidden", 32),
    *("--train.batch_size", 64, "--train.checkpoint_every", 1),
    *("--evaluate.tasks", "geometry", "--log.trackers"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 12 MB; the test is skipped where mounting one is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs a privilege that this process does not have")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_stops_with_one_line_and_keeps_what_was_complete(fastgessl, small_disk):
    run = small_disk / "run"
    outcome = fastgessl(
        "train", *QUICK, "--train.keep_checkpoints", 99, "--train.max_steps", 60, "--train.run_dir", run
    )
    assert outcome.code == 2
    last = [line for line in outcome.err.splitlines() if line.startswith("fastgessl train: ")]
    assert len(last) == 1
    assert "No space left on device" in last[0]
    assert "Traceback" not in outcome.err
    assert not list((run / "checkpoints").glob("*.part"))
    kept = checkpoint.complete(run)
    assert len(kept) >= 2
    assert all(checkpoint.load(folder)["step"] for folder in kept)
    for folder in kept[:-1]:
        shutil.rmtree(folder)
    done = int(kept[-1].name.removeprefix("step-"))
    further = ("--train.keep_checkpoints", 1, "--train.max_steps", done + 2, "--train.resume", "auto")
    again = fastgessl("train", *QUICK, *further, "--train.run_dir", run)
    assert again.code == 0, again.err
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, done + 3))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_whatever_the_disk_refuses_the_older_checkpoint_stays(tmp_path, monkeypatch, number):
    checkpoint.save(tmp_path, 1, {}, keep=1)

    def refused(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(UsageError, match=os.strerror(number)) as stopped:
        checkpoint.save(tmp_path, 2, {}, keep=1)
    assert "step-000000002" in str(stopped.value)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step-000000001"]
    assert not list((tmp_path / "checkpoints").glob("*.part"))


def test_the_log_on_a_full_disk_is_one_line_too(tmp_path, monkeypatch):
    opened = Path.open
    full = {"wb": opened, "a": lambda *_, **__: opened(Path("/dev/full"), "a")}
    monkeypatch.setattr(Path, "open", lambda path, mode, **named: full[mode](path, mode, **named))
    lines = runs.JsonLines(tmp_path / "metrics.jsonl", 1)
    with pytest.raises(UsageError, match=r"metrics.jsonl' cannot be written .No space left on device"):
        lines.write({"step": 1})
    lines.close()


def test_a_read_only_folder_is_refused_before_any_work(fastgessl, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    outcome = fastgessl("train", *QUICK, "--train.run_dir", small_disk / "run")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "Read-only file system" in outcome.err
    assert list(small_disk.iterdir()) == []


def test_a_run_whose_folder_becomes_read_only_is_not_continued_and_not_changed(fastgessl, small_disk):
    run = small_disk / "run"
    assert fastgessl("train", *QUICK, "--train.max_steps", 2, "--train.run_dir", run).code == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = sorted(run.rglob("*"))
    outcome = fastgessl(
        "train", *QUICK, "--train.max_steps", 4, "--train.run_dir", run, "--train.resume", "auto"
    )
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "Read-only file system" in outcome.err
    assert sorted(run.rglob("*")) == before


def test_a_folder_deleted_during_training_is_written_again_and_said(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    write = MetricsLog.write

    def write_then_delete(log, *rest, **named):
        write(log, *rest, **named)
        if training.step == 2:
            shutil.rmtree(run)

    monkeypatch.setattr(MetricsLog, "write", write_then_delete)
    config = small_config(data)
    training = start(config, run)
    with pytest.raises(UsageError, match=r"was deleted during training.*after step 2.*--train.resume auto"):
        run_steps(training, run)
    monkeypatch.undo()
    assert runs.read_config(run).train.max_steps == 5
    assert checkpoint.load(checkpoint.find(run, "auto"))["step"] == 2
    assert run_steps(start(config, run, checkpoint.find(run, "auto")), run) == 5


def test_if_any_starts_continues_and_starts_over_but_never_writes_into_what_is_no_run(fastgessl, tmp_path):
    run = tmp_path / "run"
    options = (*QUICK, "--train.run_dir", run, "--train.resume", "if_any")
    assert "continued from" not in fastgessl("train", *options, "--train.max_steps", 2).out
    assert "continued from step-000000002" in fastgessl("train", *options, "--train.max_steps", 3).out
    shutil.rmtree(run / "checkpoints")  # as after a kill before the first checkpoint
    assert "continued from" not in fastgessl("train", *options, "--train.max_steps", 2).out
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    outcome = fastgessl("train", *QUICK, "--train.run_dir", tmp_path / "thesis", "--train.resume", "if_any")
    assert (outcome.code, [path.name for path in (tmp_path / "thesis").iterdir()]) == (2, ["thesis.tex"])


def test_the_command_that_continues_survives_a_shell_whatever_the_folder_is_called(tmp_path):
    run = tmp_path / "it's; touch pwned $(touch pwned) `touch pwned` ü"
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {runs.continuation(run)}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert shown.stdout.splitlines() == [
        "fastgessl",
        "train",
        str(run / "config.yaml"),
        "--train.run_dir",
        str(run),
        "--train.resume",
        "auto",
    ]
    assert not list(tmp_path.glob("pwned*"))
