"""What the measuring programs write can be believed, and the GPU program tries itself out on a CPU."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, results

ROOT = Path(__file__).resolve().parents[2]


def test_a_result_names_versions_processor_and_commit(tmp_path):
    path = results.write("trial", {"answer": [1, 2]}, tmp_path)
    record = json.loads(path.read_text())
    assert record["answer"] == [1, 2]
    assert {"commit", "processor", "threads", "versions", "python", "gpus"} <= set(record)
    assert path.parent == tmp_path / results.machine()


def test_the_commit_is_dirty_if_code_changed_and_not_if_results_did(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    monkeypatch.setattr(results, "ROOT", tmp_path / "bench")
    assert results.commit() == "unknown"
    for name in ("bench/results/one.json", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = results.commit()
    (tmp_path / "bench/results/one.json").write_text("2")
    assert results.commit() == clean and "dirty" not in clean
    (tmp_path / "code.py").write_text("2")
    assert results.commit() == f"{clean}-dirty"


@pytest.mark.parametrize(("said", "known"), [("abc1234", "abc1234"), (None, "unknown")])
def test_without_git_the_commit_is_what_the_environment_says(tmp_path, monkeypatch, said, known):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(results.COMMIT, raising=False)
    if said:
        monkeypatch.setenv(results.COMMIT, said)
    assert json.loads(results.write("trial", {}, tmp_path).read_text())["commit"] == known


def test_a_tree_without_git_s_folder_is_known_by_the_environment_and_one_with_it_is_not(
    tmp_path, monkeypatch
):
    here = results.commit()
    monkeypatch.setenv(results.COMMIT, "abc1234")
    assert results.commit() == here
    monkeypatch.setattr(results, "ROOT", tmp_path / "bench")
    assert results.commit() == "abc1234"


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = results.write("trial", {"answer": 1}, tmp_path)
    with pytest.raises(TypeError):
        results.write("trial", {"answer": object()}, tmp_path)
    assert json.loads(path.read_text())["answer"] == 1


@pytest.mark.parametrize("module", ["attempts", "gpu", "processes", "timing"])
def test_the_examples_of_the_measuring_programs_hold(module):
    outcome = doctest.testmod(importlib.import_module(f"bench.{module}"))
    assert outcome.attempted and not outcome.failed


def test_the_gpu_program_tries_itself_out_on_a_cpu(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--dry-run",
        "--profile",
        "--seconds",
        "60",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = {
        path.stem.split("-gpu-")[1]: json.loads(path.read_text())
        for path in tmp_path.glob("*/*.json")
        if "-gpu-" in path.stem
    }
    assert set(records) == {
        "ceilings",
        "tests",
        "kernels",
        "steps",
        "engines",
        "quality",
        "gessl",
        "scaling",
        "profile",
    }
    assert all(record["complete"] and record["dry_run"] and record["rows"] for record in records.values())
    assert not [row for record in records.values() for row in record["rows"].values() if "error" in row]
    assert (
        records["tests"]["rows"]["pytest"]["exit_code"] == 0
        and records["tests"]["rows"]["pytest"]["not_reached"] > 30
    )
    kept = {path.name for path in tmp_path.glob("*/*-gpu-quality-1-epochs/*")}
    assert kept == {"metrics.jsonl", "timing.jsonl", "evaluation.json"}
    ours = records["steps"]["rows"]["simclr-resnet18-16"]["rows"]["ours"]
    assert ours["images_per_second"] > 0 and len(ours["samples"]) >= 3
    assert (
        set(records["scaling"]["rows"]) == {"1 ranks", "2 ranks"}
        and records["scaling"]["rows"]["2 ranks"]["ranks"] == 2
    )
    assert list(tmp_path.glob("*/*.trace.json"))


def test_a_stage_that_dies_leaves_its_rows_and_does_not_take_the_others_along(tmp_path):
    program = (
        "import os, sys; from bench import gpu, stages\n"
        "def dying(conditions):\n    yield 'first', {'rate': 1}\n    os._exit(9)\n"
        "stages.STAGES['quality'] = dying\n"
        "gpu.main(sys.argv[1:])"
    )
    words = ["--dry-run", "--stage", "quality", "--seconds", "5", "--out", str(tmp_path), "--in-this-process"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (path,) = tmp_path.glob("*/*-gpu-quality.json")
    record = json.loads(path.read_text())
    assert done.returncode == 9 and record["rows"] == {"first": {"rate": 1}} and not record["complete"]


def test_a_failure_of_ours_in_a_row_fails_the_stage_and_keeps_every_row(tmp_path):
    program = (
        "import sys; from bench import gpu, stages\n"
        "def failing(conditions):\n    yield 'first', {'contenders': {'ours': {'error': 'wrong'}}}\n    "
        "yield 'second', {'rate': 1}\n"
        "stages.STAGES['kernels'] = failing\n"
        "gpu.main(sys.argv[1:])"
    )
    words = ["--dry-run", "--stage", "kernels", "--out", str(tmp_path), "--in-this-process"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (path,) = tmp_path.glob("*/*-gpu-kernels.json")
    record = json.loads(path.read_text())
    assert done.returncode == 1 and "first, contenders, ours" in done.stderr
    assert list(record["rows"]) == ["first", "second"] and record["failed"] == ["first, contenders, ours"]


@pytest.mark.parametrize("used", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [30.0, 540.0, 1e5])
def test_stages_share_a_budget_that_is_never_exceeded(monkeypatch, budget, used):
    limits, now, given = [60, 420, 300], [1000.0], []

    def run_apart(stage, words, stops, killed):
        given.append((stops, killed))
        now[0] += used * killed
        return False

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    assert gpu.run_all(["a", "b", "c"], [], limits, budget) == ["a", "b", "c"]
    assert now[0] - 1000 <= budget + 1e-6
    assert all(
        0 < stops < killed <= own + gpu.START_AND_LAST_ROW
        for (stops, killed), own in zip(given, limits, strict=True)
    )
    if used == 1.0 and budget < sum(limits):
        assert math.isclose(now[0] - 1000, budget)


def test_a_stage_that_does_not_stop_is_killed_and_the_call_says_so(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--dry-run",
        "--stage",
        "ceilings",
        "engines",
        "--budget",
        "1",
        "--out",
        str(tmp_path),
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1
        and "ceilings: killed after" in done.stderr
        and "ceilings, engines did not end well" in done.stderr
    )
    assert time.monotonic() - started < 120


def read(path):
    """What is in a file of /proc; nothing if its process has just ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def stages_of(pid):
    """Its children that run a stage: what an import starts for a moment is none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in children if b"--in-this-process" in read(f"/proc/{child}/cmdline")]


def test_a_call_that_is_ended_takes_its_stage_along(tmp_path):
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are looked up in /proc")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--stage", "kernels", "--out", str(tmp_path)]
    called = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (stage := stages_of(called.pid)) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)  # by then the call is out of the fork and waits
    called.send_signal(signal.SIGTERM)
    assert called.wait(60) == 128 + signal.SIGTERM
    assert len(stage) == 1 and not Path(f"/proc/{stage[0]}").exists()


def test_the_documented_calls_are_understood_and_fit_ten_minutes_each_and_half_an_hour_together(monkeypatch):
    text = (ROOT / "bench" / "README.md").read_text()
    calls = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^(?:\S+=\S+ )*python -m (bench\.gpu .*)$", text, flags=re.MULTILINE)
    ]
    assert len(calls) == 3
    understood = []
    monkeypatch.setattr(
        gpu, "run_all", lambda stages, words, limits, budget: understood.append((stages, budget)) or []
    )
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    for _, *words in calls:
        assert "--out" in words
        gpu.main(words)
    budgets = [budget for _, budget in understood]
    # Beside them: ending what is cut, unpacking the wheels and starting, a minute a call; two minutes for the
    # machine.
    assert max(budgets) + 60 <= 600 and sum(budgets) + 3 * 60 + 120 <= 1800
    assert {stage for stages, _ in understood for stage in stages} == {
        "ceilings",
        "tests",
        "kernels",
        "steps",
        "gessl",
        "scaling",
        "quality",
    }
