"""Where a training step's time goes, kernel by kernel: torch's profiler, and Nsight Compute on the slowest of
our own kernels.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import results
from bench.stages import Conditions
from bench.steps import CASES, TINY_CASES, Step, batches_of, ours
from fastgessl.config import GesslConfig
from fastgessl.recipes import load

STEPS = 3
SHOWN = 25


def rows(conditions: Conditions) -> Iterator[tuple[str, Any]]:
    """The heaviest operations of a plain and of a GeSSL step; the trace lies beside the results as
    <machine>/<name>.trace.json.
    """
    cases = TINY_CASES if conditions.dry_run else CASES
    name, case = next(iter(cases.items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = (conditions.out or results.ROOT / "results") / results.machine()
    for variant, settings in {
        "plain": GesslConfig(),
        "GeSSL": load("digits-simclr-gessl-exact").config.gessl,
    }.items():
        step = Step(ours(case, settings), batches_of(case, device), device)
        step.group()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(STEPS):
                step.group()
        trace = folder / f"{name}-{variant}.trace.json".lower()
        profiler.export_chrome_trace(str(trace))
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        heaviest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))[:SHOWN]
        yield (
            f"{name}, {variant}",
            {
                "trace": trace.name,
                "microseconds": {event.key: getattr(event, key) / STEPS for event in heaviest},
                "calls": {event.key: event.count / STEPS for event in heaviest},
            },
        )
    yield "nsight compute", _nsight(conditions)


def _nsight(conditions: Conditions) -> dict[str, Any]:
    """Nsight Compute's sections for the first launch of each similarity kernel in one forward and backward."""
    if shutil.which("ncu") is None:
        return {"absent": "ncu is not on the path"}
    program = (
        "import torch; from fastgessl.kernels import info_nce; q = torch.randn(32768, 128, device='cuda', "
        "dtype=torch.bfloat16,"
        " requires_grad=True); info_nce(q, q.detach().roll(1, 0)).backward(); torch.cuda.synchronize()"
    )
    command = [
        "ncu",
        "--set",
        "basic",
        "--kernel-name-base",
        "function",
        "--launch-count",
        "20",
        sys.executable,
        "-c",
        program,
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=max(conditions.left, 30),
            cwd=Path.home(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"absent": "ncu did not end in time"}
    return {"exit_code": done.returncode, "output": done.stdout[-16000:], "error": done.stderr[-1000:]}
