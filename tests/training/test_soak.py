"""Short forms of what `make soak` does in full: kills in a loop, and twenty thousand steps at constant
memory.
"""

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_training import run_steps, small_config, start, write_images

from fastgessl.training.log import MetricsLog


@pytest.mark.parametrize(("kills", "steps"), [(2, 45), pytest.param(50, 600, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_was(tmp_path, kills, steps):
    program = Path(__file__).parents[1] / "programs" / "kill_loop.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(kills), str(steps), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert found["samples_lost"] == 0


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("steps", [120, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_handles_threads_and_logs_stay_flat(tmp_path, monkeypatch, steps):
    readings = []
    write = MetricsLog.write

    def read(log, *rest, **named):
        write(log, *rest, **named)
        if training.step % (steps // 12) == 0:
            gc.collect()
            readings.append((resident(), len(os.listdir("/proc/self/fd")), threading.active_count()))

    monkeypatch.setattr(MetricsLog, "write", read)
    config = small_config(
        write_images(tmp_path),
        "moco",
        gessl={"w_sigma": 1.0, "every": 20},
        views={"jitter_probability": 0.0, "blur_probability": 0.0, "grayscale_probability": 0.0},
        train={
            "max_steps": steps,
            "epochs": 10**6,
            "checkpoint_every": steps // 24,
            "keep_checkpoints": 2,
            "accumulate": 1,
            "batch_size": 8,
        },
        log={"trackers": ("tensorboard",)},
    )
    run = tmp_path / "run"
    training = start(config, run)
    training.accelerator.init_trackers("run")
    run_steps(training, run)
    training.accelerator.end_training()
    memory, handles, threads = zip(*readings, strict=True)
    print(
        f"{steps} steps: memory {[round(m / 2**20, 1) for m in memory]} MiB, handles {handles}, threads "
        f"{threads}"
    )
    assert len(set(handles[2:])) == 1, handles
    assert len(set(threads[2:])) == 1, threads
    # The allocator settles in the first sixth; 20,000 steps that lost one float32 an image would show as 0.6
    # MB.
    assert max(memory[6:]) - max(memory[2:6]) < 2 * 2**20, memory
    assert len(list((run / "checkpoints").iterdir())) == 2
    written = sum(
        file.stat().st_size for file in run.rglob("*") if file.is_file() and "checkpoints" not in file.parts
    )
    assert written < 3000 * steps
