"""Everything a GPU can tell, in order of value: `python -m bench.gpu [--stage ceilings tests] [--seconds 300] [--out DIR] [--dry-run]`.

Each stage has its own time limit and writes its JSON under bench/results/<gpu>/ as soon as it ends, so that a cut run still leaves
evidence. `--dry-run` takes tiny sizes, on a CPU if need be.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run, in this order")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a stage")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU if there is no GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        sys.exit("bench.gpu: torch finds no GPU here. Run it on a machine that has one, or with --dry-run.")
    for name in arguments.stage:
        started = time.perf_counter()
        measured = STAGES[name](arguments.seconds, arguments.dry_run)
        path = results.write(
            f"gpu-{name}", measured | {"seconds": time.perf_counter() - started, "dry_run": arguments.dry_run}, arguments.out
        )
        print(f"{name}: {measured}\n  {path}", flush=True)


def ceilings(seconds: float, dry_run: bool) -> dict[str, Any]:
    """What the device can do at best: bf16 matmul TFLOP/s, copy bandwidth in GB/s, exponentials a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, count = (256, 1 << 16) if dry_run else (8192, 1 << 28)
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    budget = min(seconds / 3, 5.0)
    return {
        "matmul_bf16_tflops": 2 * side**3 / _median_seconds(lambda: left @ right, budget) / 1e12,
        "copy_gb_per_second": 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), budget) / 1e9,
        "exp_per_second": count / _median_seconds(lambda: torch.exp(source, out=target), budget),
    }


def tests(seconds: float, dry_run: bool) -> dict[str, Any]:
    """`pytest -m gpu`: every kernel on the device against float64, first and second order. A dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *(["--collect-only"] if dry_run else [])]
    try:
        outcome = subprocess.run(command, cwd=results.ROOT.parent, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as cut:
        return {"exit_code": None, "cut_after_seconds": seconds, "output": (cut.stdout or b"").decode()[-4000:]}
    return {"exit_code": outcome.returncode, "output": outcome.stdout[-4000:]}


def gessl(seconds: float, dry_run: bool) -> dict[str, Any]:
    """Operations, seconds and peak bytes of GeSSL's modes x a plain step: ResNet-18 at 32 px, ResNet-50 at 224 px, batch 256, float32."""
    from bench.gessl import SMALL, cost
    from fastgessl.config import ModelConfig

    if dry_run:
        return {"resnet18": cost(4, 1, SMALL.model_copy(update={"width": 0.125}), 16)}
    return {
        "resnet18": cost(256, 10, ModelConfig(name="resnet18", stem="small"), 32),
        "resnet50": cost(256, 5, ModelConfig(name="resnet50"), 224),
    }


def _median_seconds(work: Callable[[], object], budget: float) -> float:
    """Median time of one call, after three warm-up calls, over at least five and until the budget is spent."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        work()
    wait()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 200):
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


STAGES: dict[str, Callable[[float, bool], dict[str, Any]]] = {"ceilings": ceilings, "tests": tests, "gessl": gessl}

if __name__ == "__main__":
    main()
