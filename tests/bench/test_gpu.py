"""The GPU program divides its time, keeps what a stage leaves, and says what did not end well."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from bench import gpu
from bench.results import ROOT


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(commands, budget): the record after running these stages, and the exit message."""

    def call(commands, budget=600):
        monkeypatch.setattr(gpu, "SECONDS", dict.fromkeys(commands, 60))
        monkeypatch.setattr(gpu, "command", lambda stage, *_: commands[stage])
        monkeypatch.setattr(gpu, "ENDING", 1)
        monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
        message = ""
        try:
            gpu.main(["--tiny", "--stages", *commands, "--budget", str(budget), "--out", str(tmp_path)])
        except SystemExit as stop:
            message = str(stop)
        (path,) = tmp_path.glob("*/*-gpu.json")
        return json.loads(path.read_text())["stages"], message

    return call


def test_a_stage_that_fails_or_is_cut_does_not_take_the_others_along(call):
    stages, message = call(
        {"bad": ["bash", "-c", "echo why; exit 3"], "long": ["sleep", "60"], "good": ["echo", "fine"]}, 9
    )
    assert stages["bad"]["exit_code"] == 3 and stages["bad"]["last"] == "why\n"
    assert stages["long"]["cut"] and stages["long"]["seconds"] < 9
    assert stages["good"]["exit_code"] == 0 and stages["good"]["last"] == "fine\n"
    assert "bad, long did not end well" in message


@pytest.mark.parametrize("budget", [90.0, 540.0, 1e5])
def test_stages_share_a_budget_that_is_never_exceeded(budget):
    limits, left = [60.0, 420.0, 300.0], budget
    for number in range(len(limits)):
        limit = gpu.allowance(limits[number:], left)
        assert 0 < limit <= limits[number]
        left -= limit + gpu.ENDING
    assert left >= 0 and (math.isclose(left, 0, abs_tol=1e-6) or budget > sum(limits))


def test_it_tries_itself_out_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--stages", "state", "tests", "quality"]
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    logs = "\n".join(path.read_text()[-1000:] for path in tmp_path.glob("*/*.log"))
    assert done.returncode == 0, logs
    (kept,) = tmp_path.glob("*/*-gpu-quality")
    assert {path.name for path in kept.iterdir()} == set(gpu.RUN_FILES)
    (collected,) = tmp_path.glob("*/*-gpu-tests.log")
    assert collected.read_text().count("::") > 30


def test_a_call_that_is_ended_takes_its_stage_along(tmp_path):
    program = (
        "import sys; from bench import gpu; gpu.command = lambda *_: ['bash', '-c', 'echo $$; sleep 300']; "
        "gpu.main(['--tiny', '--stages', 'steps', '--out', sys.argv[1]])"
    )
    called = subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    said = ""
    while not said and time.monotonic() < until:
        time.sleep(0.1)
        said = "".join(path.read_text() for path in tmp_path.glob("*/*.log"))
    called.send_signal(signal.SIGTERM)
    assert called.wait(60) == 128 + signal.SIGTERM
    assert subprocess.run(["kill", "-0", said.strip()], check=False, capture_output=True).returncode


def test_the_calls_of_the_readme_fit_ten_minutes_each_and_half_an_hour_together():
    text = (ROOT / "bench" / "README.md").read_text()
    calls = [
        shlex.split(line) for line in re.findall(r"^python -m bench\.gpu (.*)$", text, flags=re.MULTILINE)
    ]
    budgets = [int(words[words.index("--budget") + 1]) for words in calls]
    # Beside them: ending what is cut, unpacking the wheels and starting, a minute per call; two minutes for
    # the machine.
    assert len(calls) >= 2 and max(budgets) + 60 <= 600
    assert sum(budgets) + len(calls) * 60 + 120 <= 1800
    assert all("--out" in words for words in calls)
