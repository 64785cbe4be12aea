"""The stages of `bench.gpu`: each yields (name, row), the most valuable first, and stops when its time is
over.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import processes, pytest_log, results
from bench.attempts import NO_TIME
from bench.timing import timed

Rows = Iterator[tuple[str, Any]]
"""A name that comes again replaces its row: it holds what was found until then."""
MOST_TEST_PROCESSES = 8
RUN_FILES = ("metrics.jsonl", "timing.jsonl", "evaluation.json")


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
        yield (
            name,
            {
                "rate": amount / statistics.median(samples),
                "seconds": statistics.median(samples),
                "samples": samples,
            },
        )


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
    """`pytest -m gpu`: every kernel on the device against float64, first and second order. A dry run only
    collects them.

    On half of the cores, because most of the time goes into compiling the kernels. Each outcome is in
    <date>-gpu-tests.jsonl at once.
    """
    cores = os.cpu_count() or 1
    workers = max(1, min(cores // 2, MOST_TEST_PROCESSES))
    side_by_side = ["-n", str(workers), "--maxschedchunk", "1"] if find_spec("xdist") else []
    # Only the files that have such tests: each process would spend its first seconds on importing all others.
    files = [
        str(path)
        for path in sorted((results.ROOT.parent / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    options = ["-m", "gpu", *(["--collect-only"] if conditions.dry_run else side_by_side), *files]
    yield "pytest", run_tests(options, cores // workers, conditions)


def run_tests(options: list[str], threads: int, conditions: Conditions) -> dict[str, Any]:
    """What pytest found until it ended or the stage's time was over."""
    log = results.place("gpu-tests.jsonl", conditions.out).resolve()
    own = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.pytest_log", "--outcomes", str(log)]
    command = [sys.executable, "-m", "pytest", *own, *options]
    ended = processes.run(command, conditions.left, environment={"OMP_NUM_THREADS": str(threads)})
    return {
        "exit_code": ended.exit_code,
        **pytest_log.summary(log),
        "output": (ended.out + ended.err)[-4000:],
    }


def kernels(conditions: Conditions) -> Rows:
    """The losses against their targets, floors and peers."""
    from bench.targets import rows

    yield from rows(conditions)


def steps(conditions: Conditions) -> Rows:
    """Whole training steps beside other trainers', and where the time goes."""
    from bench.steps import CASES, TINY_CASES, measurements

    cases = TINY_CASES if conditions.dry_run else CASES
    for number, (name, case) in enumerate(cases.items()):
        if conditions.left <= 0:
            yield name, NO_TIME
            continue
        share = conditions.left / (len(cases) - number)
        for so_far in measurements(case, 3 if conditions.dry_run else 50, share):
            yield name, so_far


def engines(conditions: Conditions) -> Rows:
    """The input engines alone."""
    if find_spec("nvidia.dali") is None:
        yield "dali", {"absent": "nvidia-dali is not installed"}
    yield from _engine_rows(conditions)


def _engine_rows(conditions: Conditions) -> Rows:
    from bench.pipelines import gpu_rows

    yield from gpu_rows(conditions.photos, conditions.left, tiny=conditions.dry_run)


def quality(conditions: Conditions) -> Rows:
    """A short run of the real command to a k-NN and linear accuracy: CIFAR-10, ResNet-18, SimCLR, and the
    seconds that it took.
    """
    if conditions.dry_run:
        recipe, options = "digits-simclr", {"train.epochs": 1, "model.width": 0.0625}
    elif conditions.cifar10 is None:
        yield "cifar10-simclr", {"absent": "CIFAR-10: give it with --cifar10 FILE.npz"}
        return
    else:
        recipe, options = (
            "cifar10-simclr",
            {"data.name": "npz", "data.root": conditions.cifar10, "train.compile": True},
        )
    short, long = 1 if conditions.dry_run else 20, 200
    row = _quality(recipe, options | {"train.epochs": short}, f"gpu-quality-{short}-epochs", conditions)
    yield f"{recipe}, {short} epochs", row
    if "training_seconds" not in row or conditions.dry_run:
        return
    expected = row["seconds"] + (long / short - 1) * row["training_seconds"]
    if expected > conditions.left:
        yield (
            f"{recipe}, {long} epochs",
            {"absent": f"about {expected:.0f} s, and {conditions.left:.0f} s were left"},
        )
        return
    yield (
        f"{recipe}, {long} epochs",
        _quality(recipe, options | {"train.epochs": long}, f"gpu-quality-{long}-epochs", conditions),
    )


def _quality(recipe: str, options: dict[str, Any], name: str, conditions: Conditions) -> dict[str, Any]:
    """One run. What it measured lies beside the results in the folder `name`, also where the run was cut."""
    kept = results.place(name, conditions.out)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        command = [sys.executable, "-m", "fastgessl", "train", recipe, *words, "--train.run_dir", str(run)]
        command += ["--log.trackers", "--evaluate.tasks", "linear", "knn"]
        taken: dict[str, float] = {}
        try:
            ended = timed(taken, "seconds", lambda: processes.run(command, conditions.left))
        finally:
            kept.mkdir(exist_ok=True)
            for file in RUN_FILES:
                if (run / file).exists():
                    shutil.copy(run / file, kept)
    if ended.exit_code is None:
        return {"absent": f"not done within {taken['seconds']:.0f} s", "kept": kept.name}
    if ended.exit_code:
        return {"error": ended.err[-4000:], "kept": kept.name}
    timing = [json.loads(line) for line in (kept / "timing.jsonl").read_text().splitlines()]
    accuracy = json.loads((kept / "evaluation.json").read_text())["rows"]["this run"]
    return taken | {
        "training_seconds": sum(line["seconds"] for line in timing),
        **accuracy,
        "kept": kept.name,
    }


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
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        ended = processes.run(
            [*launch, "-m", "bench.scaling", "--to", file.name, *tiny], max(conditions.left, 30)
        )
        if ended.exit_code is None:
            return {"absent": "not done in the time that was left", "output": ended.err[-4000:]}
        return (
            json.loads(Path(file.name).read_text()) if ended.exit_code == 0 else {"error": ended.err[-4000:]}
        )


def gessl(conditions: Conditions) -> Rows:
    """Operations, seconds and peak bytes of GeSSL's modes x a plain step, float32: ResNet-18 at 32 px, batch
    256; ResNet-50 at 224 px, 64.

    A view takes 72 MiB of ResNet-50's plain step, and up to 7.4 x that when K = 3 keeps its graph: 66 GiB at
    64 images.
    """
    from bench.gessl import SMALL, costs
    from fastgessl.config import ModelConfig

    small, large = ModelConfig(name="resnet18", stem="small"), ModelConfig(name="resnet50")
    cases = {"resnet18": (256, 10, small, 32), "resnet50": (64, 5, large, 224)}
    if conditions.dry_run:
        cases = {"resnet18": (2, 1, SMALL.model_copy(update={"width": 0.0625}), 16)}
    for name, case in cases.items():
        for so_far in costs(*case, conditions.deadline):
            yield name, so_far


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
