"""Stages of the GPU program stop in time, say what they left out, and keep what was found."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import gessl, results, stages, steps
from bench.processes import Ended
from bench.stages import Conditions

TESTS = """
import time, pytest
@pytest.mark.parametrize("case", range(3))
def test_many(case): pass
def test_right(record_property): record_property("share", 0.25)
def test_wrong(): assert 1 + 1 == 3
@pytest.mark.skip(reason="no such card")
def test_skipped(): pass
"""


@pytest.fixture
def conditions(tmp_path):
    def make(seconds, *, dry_run=True):
        return Conditions(time.perf_counter() + seconds, dry_run, Path("cifar10.npz"), None, tmp_path / "out")

    return make


@pytest.fixture
def folder(tmp_path):
    """A folder of tests that pytest takes by itself."""

    def make(source):
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "t" / "test_it.py").write_text(source)
        return [
            "-c",
            str(tmp_path / "t" / "pytest.ini"),
            "--rootdir",
            str(tmp_path / "t"),
            str(tmp_path / "t"),
        ]

    return make


def log_of(conditions):
    return [
        json.loads(line) for line in results.place("gpu-tests.jsonl", conditions.out).read_text().splitlines()
    ]


@pytest.mark.parametrize("processes", [0, 2])
def test_every_outcome_is_named_with_what_failed_tests_said(conditions, folder, processes):
    if processes and find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    options = ["-n", str(processes)] if processes else []
    row = stages.run_tests([*folder(TESTS), *options], 1, conditions(600))
    assert row["exit_code"] == 1
    assert (row["passed"], row["failed"], row["skipped"], row["not_reached"]) == (4, 1, 1, 0)
    assert row["outcomes"]["test_it.py::test_many[1]"] == "passed"
    assert (
        "assert (1 + 1) == 3" in row["said"]["test_it.py::test_wrong"]
        and "no such card" in row["said"]["test_it.py::test_skipped"]
    )
    assert row["measured"] == {"test_it.py::test_right": {"share": 0.25}}


def test_tests_that_stand_alone_run_before_those_with_many_cases(conditions, folder):
    given = conditions(600)
    stages.run_tests(folder(TESTS), 1, given)
    ran = [line["test"].partition("::")[2] for line in log_of(given) if "test" in line]
    assert ran == ["test_right", "test_wrong", "test_skipped", "test_many[0]", "test_many[1]", "test_many[2]"]


def test_a_cut_run_names_what_passed_failed_was_cut_and_was_not_reached(conditions, folder):
    row = stages.run_tests(
        folder(TESTS.replace("(case): pass", "(case): time.sleep(60 * case)")), 1, conditions(25)
    )
    assert row["exit_code"] is None
    assert row["outcomes"]["test_it.py::test_right"] == "passed" and "test_it.py::test_wrong" in row["said"]
    assert (
        row["outcomes"]["test_it.py::test_many[1]"] == "cut"
        and row["outcomes"]["test_it.py::test_many[2]"] == "not reached"
    )
    assert (row["passed"], row["failed"], row["skipped"], row["cut"], row["not_reached"]) == (2, 1, 1, 1, 1)


def test_tests_that_cannot_be_collected_fail_and_say_why(conditions, folder):
    row = stages.run_tests(folder("import no_such_module"), 1, conditions(600))
    assert row["exit_code"] == 2 and "no_such_module" in row["output"]


# In the place of torch stands what is asked of it: its import would take longer than all else.
POISONED = """
import sys, pytest
from types import SimpleNamespace
lost = False
def synchronize():
    if lost: raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch = SimpleNamespace(OutOfMemoryError=MemoryError, cuda=SimpleNamespace(is_available=lambda: True, synchronize=synchronize))
sys.modules["torch"] = torch
def test_before(): pass
def test_illegal():
    global lost
    lost = True
    torch.cuda.synchronize()
@pytest.mark.parametrize("case", range(8))
def test_after(case): torch.cuda.synchronize()
"""


def test_a_kernel_that_ends_the_device_s_answers_fails_its_own_test_and_no_other(conditions, folder):
    pytest.importorskip("xdist")
    row = stages.run_tests([*folder(POISONED), "-n", "2", "--maxschedchunk", "1"], 1, conditions(600))
    assert {name for name, outcome in row["outcomes"].items() if outcome != "passed"} == {
        "test_it.py::test_illegal"
    }
    assert row["passed"] == 9 and "illegal memory access" in row["said"]["test_it.py::test_illegal"]


def test_in_one_process_nothing_runs_after_it(conditions, folder):
    row = stages.run_tests(folder(POISONED), 1, conditions(600))
    assert (row["passed"], row["failed"], row["not_reached"]) == (1, 1, 8) and row["exit_code"] == 1


def quality(monkeypatch, given, **row):
    """Names and rows of the stage if each of its runs gives this row."""
    monkeypatch.setattr(stages, "_quality", lambda *_: dict(row))
    return dict(stages.quality(given))


def test_the_long_run_starts_only_if_ten_times_the_short_one_s_training_fits(monkeypatch, conditions):
    short = {"seconds": 60.0, "training_seconds": 40.0}
    # 20 s beside training, and 10 x 40 s of it.
    rows = quality(monkeypatch, conditions(400, dry_run=False), **short)
    assert rows["cifar10-simclr, 20 epochs"] == short
    assert rows["cifar10-simclr, 200 epochs"]["absent"].startswith("about 420 s")
    assert (
        quality(monkeypatch, conditions(440, dry_run=False), **short)["cifar10-simclr, 200 epochs"] == short
    )


def test_without_a_short_run_no_long_one_is_begun(monkeypatch, conditions):
    rows = quality(monkeypatch, conditions(4000, dry_run=False), absent="not done within 300 s")
    assert list(rows) == ["cifar10-simclr, 20 epochs"]


def test_a_cut_run_keeps_what_it_logged_until_then(monkeypatch, conditions):
    def cut(command, seconds):
        run = Path(command[command.index("--train.run_dir") + 1])
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        return Ended(None)

    monkeypatch.setattr(stages.processes, "run", cut)
    given = conditions(60)
    row = stages._quality("digits-simclr", {}, "gpu-quality-1-epochs", given)
    assert row["absent"].startswith("not done within")
    (kept,) = given.out.glob("*/*-gpu-quality-1-epochs")
    assert kept.name == row["kept"] and [path.name for path in kept.iterdir()] == ["metrics.jsonl"]


def test_ranks_that_do_not_end_are_a_row_and_not_the_end_of_the_stage(monkeypatch, conditions):
    monkeypatch.setattr(stages.processes, "run", lambda *_: Ended(None, "", "waiting"))
    assert dict(stages.scaling(conditions(60)))["1 ranks"] == {
        "absent": "not done in the time that was left",
        "output": "waiting",
    }


def test_training_steps_without_time_say_so(conditions):
    assert dict(stages.steps(conditions(0.0))) == {
        name: {"absent": "no time was left"} for name in steps.TINY_CASES
    }


def test_a_mode_that_finds_no_room_costs_no_other_mode_its_row(monkeypatch, conditions):
    monkeypatch.setattr(
        gessl, "CONTENDERS", {name: gessl.CONTENDERS[name] for name in ("plain", "exact", "fast")}
    )
    take = gessl._steps

    def steps_without_room(objective, views):
        if objective.settings == gessl.CONTENDERS["exact"]:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        take(objective, views)

    monkeypatch.setattr(gessl, "_steps", steps_without_room)
    found = list(stages.gessl(conditions(600)))
    assert [list(row["rows"]) for _, row in found] == [
        ["plain"],
        ["plain", "exact"],
        ["plain", "exact", "fast"],
    ]
    rows = found[-1][1]["rows"]
    assert "20 GiB" in rows["exact"]["absent"] and rows["fast"]["seconds"] > 0
