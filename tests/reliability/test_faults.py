"""A rank is killed under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tiny_run import read_lines

LIGHT = (
    "digits-simclr",
    "--views.size",
    8,
    "--model.width",
    0.125,
    "--method.projector_hidden",
    32,
    "--train.batch_size",
    64,
)
QUICK = (*LIGHT, "--train.checkpoint_every", 1, "--evaluate.tasks", "geometry", "--log.trackers")


def launched(arguments, *, ranks: int, **options) -> subprocess.Popen[str]:
    """The real command on so many gloo processes under torchrun, which restarts them up to three times."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "--max_restarts=3",
    ]
    command = [*launcher, "-m", "fastgessl", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher has started, by rank."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(word) for word in listed.split()]


def steps_done(run) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition, process, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_after_a_rank_is_killed_torchrun_starts_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    run, steps = tmp_path / "run", 30
    options = (*QUICK, "--train.max_steps", steps, "--train.run_dir", run, "--train.resume", "if_any")
    process = launched(options, ranks=2)
    try:
        wait_until(lambda: steps_done(run) >= 5, process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert "rank 1 (host" in err
    assert "has died" in err
    assert "continued from step-" in out
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, steps + 1))
