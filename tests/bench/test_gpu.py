"""The GPU program divides its time, keeps what a stage leaves, and says what did not end well."""

import json
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
    for number, limit in enumerate(limits):
        allowed = gpu.allowance(limits[number:], left)
        assert 0 < allowed <= limit
        left -= allowed + gpu.ENDING
    assert left == pytest.approx(0, abs=1e-6) or (left > 0 and budget > sum(limits))


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
