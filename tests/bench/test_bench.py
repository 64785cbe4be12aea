"""Contenders take turns, failures are told apart, and what is written can be believed."""

import doctest
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import results
from bench.memory import device_peak_bytes, peak_bytes

ROOT = results.ROOT
CASES = """
import time, torch

def fails(): raise AssertionError("on purpose")
def no_room(): raise torch.OutOfMemoryError("tried to allocate 20 GiB")
def slow(): time.sleep(0.02)
def thrice():
    for _ in range(3): slow()

def test_turns(contend):
    who = {"ours": slow, "lightly": fails, "dense": no_room, "inf-cl": "not installed", "thrice": thrice}
    contend({"what": "turns"}, who, {"thrice": 3})

def test_error(contend):
    contend({"what": "error"}, {"ours": slow, "ours, compiled": fails, "dense": slow})

def test_ours_has_no_room(contend):
    contend({"what": "no room"}, {"ours": no_room, "dense": slow})
"""


def run_pytest(*words, out):
    """pytest with the benchmarks' options, as it runs alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-only", "--tiny", f"--out={out}"]
    command = [sys.executable, "-m", "pytest", *map(str, words), *options]
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def contests(tmp_path_factory):
    """(pytest's outcome, the cases that it wrote) of CASES."""
    folder = tmp_path_factory.mktemp("contests")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_contests.py").write_text(CASES)
    where = ["-c", folder / "pytest.ini", "--rootdir", folder, folder / "test_contests.py"]
    done = run_pytest("-p", "bench.conftest", "--benchmark-timer=time.perf_counter", *where, out=folder)
    (path,) = folder.glob("*/*-contests.json")
    return done, json.loads(path.read_text())


def test_contenders_take_turns_and_ratios_are_to_ours(contests):
    rows = contests[1]["cases"]["turns"]["rows"]
    assert rows["ours"]["ratio_to_ours"] == 1 and len(rows["ours"]["samples"]) == 3
    assert rows["thrice"]["seconds"] > 0 and len(rows["thrice"]["samples"]) == 3
    assert rows["thrice"]["ratio_to_ours"] == pytest.approx(
        rows["thrice"]["seconds"] / rows["ours"]["seconds"], rel=1
    )


def test_what_cannot_run_is_absent_and_takes_no_other_along(contests):
    rows = contests[1]["cases"]["turns"]["rows"]
    assert rows["lightly"] == {"absent": "AssertionError('on purpose')"}
    assert "20 GiB" in rows["dense"]["absent"] and rows["inf-cl"] == {"absent": "not installed"}


def test_a_failure_of_ours_fails_the_case_after_the_others_ran(contests):
    done, record = contests
    rows = record["cases"]["error"]["rows"]
    assert "on purpose" in rows["ours, compiled"]["error"] and rows["dense"]["seconds"] > 0
    assert done.returncode == 1 and "1 failed, 1 passed, 1 skipped" in done.stdout
    assert list(record["cases"]["no room"]["rows"]["ours"]) == ["absent"]


@pytest.mark.parametrize("name", ["losses", "steps", "views", "gessl", "evaluation"])
def test_a_benchmark_runs_at_its_smallest(name, tmp_path):
    done = run_pytest(f"bench/test_{name}.py", out=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = tmp_path.glob(f"*/*-{name}.json")
    record = json.loads(path.read_text())
    assert record["tiny"] and record["cases"]
    assert {"commit", "processor", "threads", "versions", "python", "gpus"} <= record.keys()
    timed = [case["rows"] for case in record["cases"].values() if "ours" in case["rows"]]
    assert all(rows["ours"]["seconds"] > 0 for rows in timed)


def git(folder, *words):
    words = ("-c", "user.name=a", "-c", "user.email=a@b.c", *words)
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_dirty_if_code_changed_and_not_if_results_did(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv(results.COMMIT, raising=False)
    assert results.commit() == "unknown"
    for name in ("bench/results/one.json", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = results.commit()
    (tmp_path / "bench/results/one.json").write_text("2")
    assert results.commit() == clean and "dirty" not in clean
    (tmp_path / "code.py").write_text("2")
    assert results.commit() == f"{clean}-dirty"


def test_without_git_the_commit_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(results.COMMIT, "abc1234")
    assert results.commit() == "abc1234"


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = results.write("trial", {"answer": 1}, tmp_path)
    with pytest.raises(TypeError):
        results.write("trial", {"answer": object()}, tmp_path)
    assert json.loads(path.read_text())["answer"] == 1


def test_live_bytes_end_where_tensors_die_in_a_backward_too():
    weight = torch.nn.Linear(100, 100, bias=False)
    rows = torch.ones(10, 100)
    # Output, its sum and the slopes of both fit in three outputs; the gradient of the weights is its largest
    # part.
    size = peak_bytes(lambda: weight(rows).sum().backward(), weight)
    assert 4 * 100 * 100 <= size <= 4 * (100 * 100 + 4 * 10 * 100)


def test_resident_memory_is_counted_beyond_what_is_held():
    def work():
        return (torch.zeros(4096, 4096) + 1).sum()

    work()
    found = device_peak_bytes(work)
    # Linux counts resident pages per CPU and adds them up late: 292 KiB of 32 MiB were missing once.
    assert found is None or 1.99 * 64 * 2**20 <= found < 3 * 64 * 2**20


@pytest.mark.parametrize("module", ["gpu", "memory", "studies", "trace_step"])
def test_the_examples_of_the_programs_hold(module):
    outcome = doctest.testmod(importlib.import_module(f"bench.{module}"))
    assert outcome.attempted and not outcome.failed
