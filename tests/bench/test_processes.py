"""A program that is cut takes along what it started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench import processes


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("tail", ["wait", "true"], ids=["cut", "ended by itself"])
def test_nothing_that_a_program_started_outlives_it(tmp_path, tail):
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are looked up in /proc")
    ended = processes.run(["bash", "-c", f"sleep 300 & echo $! > {tmp_path}/pid; echo said; {tail}"], 2.0)
    assert ended.exit_code == (None if tail == "wait" else 0)
    assert ended.out == "said\n"
    assert not alive(int((tmp_path / "pid").read_text()))


def test_what_ignores_sigterm_is_killed_and_its_last_words_are_kept(monkeypatch):
    monkeypatch.setattr(processes, "LAST_WORDS", 0.5)
    started = time.monotonic()
    ended = processes.run(
        ["bash", "-c", "trap 'echo asked' TERM; echo first; while true; do sleep 0.1; done"], 3.0
    )
    assert ended.exit_code is None and ended.out.split() == ["first", "asked"]
    assert time.monotonic() - started < 15


def test_a_process_that_got_away_with_the_output_does_not_hold_the_caller():
    started = time.monotonic()
    ended = processes.run(["bash", "-c", "setsid sleep 30 & echo done"], 60.0)
    assert ended.out == "done\n" and time.monotonic() - started < 20


def test_the_environment_is_added_to_this_one(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    assert processes.run(["bash", "-c", "echo $KEPT $ADDED"], 60.0, environment={"ADDED": "2"}).out == "1 2\n"
    assert "ADDED" not in os.environ
