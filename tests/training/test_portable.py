"""Training needs nothing that only Linux has."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_run import read_lines


def test_two_steps_are_trained_where_the_system_offers_what_windows_and_macos_do(tmp_path):
    program = Path(__file__).parents[1] / "programs" / "bare_system.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
