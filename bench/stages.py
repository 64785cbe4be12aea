"""The stages of `bench.gpu`: each yields (name, row), the most valuable first, and stops when its time is over."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.timing import timed

Rows = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Conditions:
    """What a stage may use."""

    deadline: float
    """time.perf_counter() at which it should have ended."""
    dry_run: bool
    cifar10: Path | None
    photos: Path | None
    out: Path | None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()


def ceilings(conditions: Conditions) -> Rows:
    """What the device can do at best: bf16 matmul TFLOP/s, copy bandwidth in GB/s, exponentials a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, count = (256, 1 << 16) if conditions.dry_run else (8192, 1 << 28)
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "matmul_bf16_tflops": (2 * side**3 / 1e12, lambda: left @ right),
        "copy_gb_per_second": (2 * source.nbytes / 1e9, lambda: target.copy_(source)),
        "exp_per_second": (count, lambda: torch.exp(source, out=target)),
    }
    for name, (amount, call) in work.items():
        samples = _samples(call, 0.0 if conditions.dry_run else min(conditions.left / 3, 5.0))
        yield name, {"rate": amount / statistics.median(samples), "seconds": statistics.median(samples), "samples": samples}


def _samples(work: Callable[[], object], budget: float) -> list[float]:
    """Seconds of single calls after three to warm up: at least five, at most 200, until the budget is spent."""
    for _ in range(3):
        work()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - begin < budget and len(samples) < 200):
        taken: dict[str, float] = {}
        timed(taken, "", work)
        samples.append(taken[""])
    return samples


def tests(conditions: Conditions) -> Rows:
    """`pytest -m gpu`: every kernel on the device against float64, first and second order. A dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    try:
        done = subprocess.run(
            [*command, *(["--collect-only"] if conditions.dry_run else [])],
            cwd=results.ROOT.parent, capture_output=True, text=True, check=False, timeout=max(conditions.left, 1),
        )  # fmt: skip
    except subprocess.TimeoutExpired as cut:
        yield "pytest", {"exit_code": None, "output": (cut.stdout or b"").decode()[-12000:]}
        return
    yield "pytest", {"exit_code": done.returncode, "output": done.stdout[-12000:]}


def kernels(conditions: Conditions) -> Rows:
    """The losses against their targets, floors and peers."""
    from bench.targets import rows

    yield from rows(conditions)


def steps(conditions: Conditions) -> Rows:
    """Whole training steps beside other trainers', and where the time goes."""
    from bench.steps import CASES, TINY_CASES, measure

    cases = TINY_CASES if conditions.dry_run else CASES
    for number, (name, case) in enumerate(cases.items()):
        if conditions.left <= 0:
            return
        share = conditions.left / (len(cases) - number)
        yield name, measure(case, 3 if conditions.dry_run else 50, share / 2)


def engines(conditions: Conditions) -> Rows:
    """The input engines alone."""
    if find_spec("nvidia.dali") is None:
        yield "dali", {"absent": "nvidia-dali is not installed"}
    yield from _engine_rows(conditions)


def _engine_rows(conditions: Conditions) -> Rows:
    from bench.pipelines import gpu_rows

    yield from gpu_rows(conditions.photos, conditions.left, tiny=conditions.dry_run)


def quality(conditions: Conditions) -> Rows:
    """A short run of the real command to a k-NN and linear accuracy: CIFAR-10, ResNet-18, SimCLR, and the seconds that it took."""
    if conditions.dry_run:
        recipe, options = "digits-simclr", {"train.epochs": 1, "model.width": 0.0625}
    elif conditions.cifar10 is None:
        yield "cifar10-simclr", {"absent": "CIFAR-10: give it with --cifar10 FILE.npz"}
        return
    else:
        recipe, options = "cifar10-simclr", {"data.name": "npz", "data.root": conditions.cifar10, "train.compile": True}
    for epochs in (1,) if conditions.dry_run else (20, 200):
        if conditions.left <= 0:
            return
        yield f"{recipe}, {epochs} epochs", _quality(recipe, options | {"train.epochs": epochs}, conditions)


def _quality(recipe: str, options: dict[str, Any], conditions: Conditions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "fastgessl", "train", recipe, *words, "--train.run_dir", str(run)]
        command += ["--log.trackers", "--evaluate.tasks", "linear", "knn"]
        taken: dict[str, float] = {}
        try:
            done = timed(taken, "seconds", lambda: subprocess.run(command, capture_output=True, text=True, timeout=conditions.left))
        except subprocess.TimeoutExpired:
            return {"absent": f"not done within {conditions.left:.0f} s more"}
        if done.returncode:
            return {"error": done.stderr[-4000:]}
        timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
        trained = sum(line["seconds"] for line in timing)
        return taken | {"training_seconds": trained, **json.loads((run / "evaluation.json").read_text())["rows"]["this run"]}


def scaling(conditions: Conditions) -> Rows:
    """Gather, ring and synchronised batch norm on 1, 2, 4 and 8 GPUs; with one, NCCL at world size 1."""
    present = torch.cuda.device_count()
    for ranks in (1, 2) if conditions.dry_run else (1, 2, 4, 8):
        if not conditions.dry_run and ranks > present:
            yield f"{ranks} ranks", {"absent": f"{present} GPUs here"}
            continue
        yield f"{ranks} ranks", _scaled(ranks, conditions)


def _scaled(ranks: int, conditions: Conditions) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        tiny = ["--tiny"] if conditions.dry_run else []
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [*launch, "-m", "bench.scaling", "--to", file.name, *tiny]
        done = subprocess.run(
            command, cwd=results.ROOT.parent, capture_output=True, text=True, timeout=max(conditions.left, 30), check=False
        )
        return json.loads(Path(file.name).read_text()) if done.returncode == 0 else {"error": done.stderr[-4000:]}


def gessl(conditions: Conditions) -> Rows:
    """Operations, seconds and peak bytes of GeSSL's modes x a plain step: ResNet-18 at 32 px, ResNet-50 at 224 px, batch 256, float32."""
    from bench.gessl import SMALL, cost
    from fastgessl.config import ModelConfig

    if conditions.dry_run:
        yield "resnet18", cost(2, 1, SMALL.model_copy(update={"width": 0.0625}), 16)
        return
    yield "resnet18", cost(256, 10, ModelConfig(name="resnet18", stem="small"), 32)
    yield "resnet50", cost(256, 5, ModelConfig(name="resnet50"), 224)


def profile(conditions: Conditions) -> Rows:
    """A torch profiler trace of training steps, and Nsight Compute's summary of the slowest of our kernels."""
    from bench.profiling import rows

    yield from rows(conditions)


STAGES: dict[str, Callable[[Conditions], Rows]] = {
    "ceilings": ceilings,
    "tests": tests,
    "kernels": kernels,
    "steps": steps,
    "engines": engines,
    "quality": quality,
    "gessl": gessl,
    "scaling": scaling,
    "profile": profile,
}
