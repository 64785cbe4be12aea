"""The run's folder: never overwritten, readable again."""

import json

import pytest

from fastgessl import runs
from fastgessl.config import Config, UsageError


def _config(**train: object) -> Config:
    return Config(recipe="digits-simclr").model_copy(
        update={"train": Config().train.model_copy(update=train)}
    )


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = runs.run_folder(_config())
    first.mkdir(parents=True)
    assert runs.run_folder(_config()) != first
    assert first.parent.name == "runs"


def test_a_folder_with_something_in_it_is_in_the_way_unless_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in ("never", "if_any", "elsewhere/checkpoints/step-000000003"):
        with pytest.raises(UsageError, match="not empty"):
            runs.run_folder(_config(run_dir=tmp_path, resume=resume))
    assert runs.run_folder(_config(run_dir=tmp_path, resume="auto")) == tmp_path


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        runs.run_folder(_config(run_dir=tmp_path / "file"))


def test_resume_auto_needs_to_know_which_run():
    with pytest.raises(UsageError, match="run_dir"):
        runs.run_folder(_config(resume="auto"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        runs.create(tmp_path / "file" / "below", Config(), {})


def test_the_configuration_comes_back_as_written(tmp_path):
    config = _config(epochs=3)
    runs.create(tmp_path, config, {"fact": 1})
    assert runs.read_config(tmp_path) == config
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["fact"] == 1
    assert environment["versions"]["torch"]


def test_a_continuation_s_configuration_is_written_and_its_changes_are_named(tmp_path):
    before, now = _config(epochs=3), _config(epochs=4, run_dir=tmp_path, resume="auto")
    runs.create(tmp_path, before, {})
    runs.create(tmp_path, now, {"fact": 1}, continued="step-9")
    assert runs.changes(before, now) == ["train.epochs: 3 -> 4"]
    assert runs.read_config(tmp_path) == _config(epochs=4)
    assert json.loads((tmp_path / "environment-step-9.json").read_text())["fact"] == 1
    assert "fact" not in json.loads((tmp_path / "environment.json").read_text())


def test_a_configuration_of_another_version_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {no_such_option: 1}")
    with pytest.raises(UsageError, match="not a configuration of this version"):
        runs.read_config(tmp_path)


def test_resumed_metrics_repeat_no_step_and_survive_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = runs.JsonLines(path, first_step=3)
    lines.write({"step": 3, "loss": 0.5})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]
