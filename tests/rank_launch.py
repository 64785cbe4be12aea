"""Several gloo processes on this machine, for what only ranks can show."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def launch(program: Path, ranks: int, folder: Path) -> list[dict[Any, Any]]:
    """Run `program RANK WORLD_SIZE FOLDER` for each rank; returns what each saved as RANK.pt. Fails as soon
    as one of them does.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(program.parents[2]), *sys.path]),
    }
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(ranks), str(folder)],
            env=environment,
            stderr=log.open("w"),
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + 300
    try:
        while (codes := [process.poll() for process in processes]) != [0] * ranks:
            assert not any(codes) and time.monotonic() < deadline, f"{codes}\n" + "\n".join(
                log.read_text() for log in logs
            )
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    reports = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    assert [report["world_size"] for report in reports] == [ranks] * ranks
    return reports
