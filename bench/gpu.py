"""Run what a GPU should run, in order of value, within a budget.

    python -m bench.gpu [--stages tests losses …] [--budget 540] [--out DIR] [--tiny]

Each stage is a process with a time limit that writes its results after each row, so that a crash or a cut
leaves what was found until then. What it says is in <date>-gpu-<stage>.log, how it ended in <date>-gpu.json.
`--tiny` tries all of it out, on a CPU if need be.
"""

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import results

SECONDS = {"state": 10, "tests": 420, "losses": 420, "steps": 420, "views": 180, "gessl": 240, "quality": 900}
"""The most that a stage takes; in order of value."""
ENDING = 20
"""Seconds from the interrupt at a stage's limit, at which pytest still says what failed, to its end."""
RUN_FILES = ("metrics.jsonl", "timing.jsonl", "evaluation.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--stages", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for the whole call")
    parser.add_argument("--cifar10", type=Path, help="an .npz with train_x, train_y, test_x, test_y")
    parser.add_argument("--photos", type=Path, help="a folder of photos, for the engines that decode files")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run?")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit("bench.gpu: torch finds no GPU here. Run it on a machine that has one, or with --tiny.")
    # So that a call that is ended from outside ends its stage too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ends, found = time.monotonic() + arguments.budget, {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, stage in enumerate(arguments.stages):
            limits = [SECONDS[later] for later in arguments.stages[number:]]
            limit = allowance(limits, ends - time.monotonic())
            found[stage] = run(stage, command(stage, arguments, Path(scratch)), limit, arguments.out)
            results.write("gpu", {"tiny": arguments.tiny, "stages": found}, arguments.out)
            print(f"{stage}: {found[stage]}", flush=True)
        keep_run(Path(scratch), arguments.out)
    if failed := [stage for stage, row in found.items() if row["exit_code"]]:
        sys.exit(f"bench.gpu: {', '.join(failed)} did not end well; see the logs.")


def allowance(limits: Sequence[float], left: float) -> float:
    """Seconds of the first of some stages when all of them together have `left` seconds: its part of what
    they would take. What it does not use is there for the next ones.

    >>> allowance([60, 420, 300], math.inf), allowance([60, 420, 300], 420)
    (60, 20.0)
    """
    whole = sum(limits) + ENDING * len(limits)
    return min(limits[0], max(left * (limits[0] + ENDING) / whole - ENDING, 1))


def command(stage: str, arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """What a stage runs."""
    run_pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "bench.gpu"]
    tiny = ["--tiny"] if arguments.tiny else []
    paths = {key: value for key, value in vars(arguments).items() if isinstance(value, Path)}
    given = [f"--{key}={value.resolve()}" for key, value in paths.items()]
    if stage == "state":
        return ["bash", "-c", "nvidia-smi -q || true"]
    if stage == "tests":
        # Only the files that have such tests; half of the cores, because most of the time compiles kernels.
        tests = sorted((results.ROOT / "tests").rglob("test_*.py"))
        files = [str(path) for path in tests if "mark.gpu" in path.read_text()]
        processes = str(min((os.cpu_count() or 2) // 2, 8))
        workers = ["-n", processes, "--maxschedchunk=1"] if find_spec("xdist") else []
        report = f"--junit-xml={results.place('gpu-tests.xml', arguments.out)}"
        how = ["--collect-only", "-q"] if arguments.tiny else ["-v", "--tb=short", report, *workers]
        return [*run_pytest, "-m", "gpu", *how, *files]
    if stage != "quality":
        file = f"bench/test_{stage}.py"
        return [*run_pytest, "-v", "-p", "no:xdist", "--benchmark-only", file, *tiny, *given]
    if arguments.tiny:
        recipe, options = "digits-simclr", ["--train.epochs", "1", "--model.width", "0.125"]
    elif arguments.cifar10:
        recipe, options = (
            "cifar10-simclr",
            ["--data.name", "npz", "--data.root", str(arguments.cifar10.resolve())],
        )
        options += ["--train.epochs", "20", "--train.compile", "True"]
    else:
        return ["echo", "absent: give CIFAR-10 with --cifar10 FILE.npz"]
    options += [
        "--train.run_dir",
        str(scratch / "run"),
        "--log.trackers",
        "--evaluate.tasks",
        "linear",
        "knn",
    ]
    return [sys.executable, "-m", "fastgessl", "train", recipe, *options]


def run(stage: str, words: Sequence[str], limit: float, out: Path | None) -> dict[str, Any]:
    """Run a stage to its end or its limit; how it ended, and the last that it said."""
    log = results.place(f"gpu-{stage}.log", out).resolve()
    started = time.monotonic()
    timed = ["timeout", "--signal=INT", f"--kill-after={ENDING}", f"{limit:.0f}", *words]
    with log.open("w") as said:
        process = subprocess.Popen(timed, stdout=said, stderr=subprocess.STDOUT, cwd=results.ROOT)
        try:
            code = process.wait()
        finally:
            process.terminate()
    found = {"exit_code": code, "cut": code in (124, 137), "seconds": time.monotonic() - started}
    return found | {"limit": limit, "last": log.read_text(errors="replace")[-500:]}


def keep_run(scratch: Path, out: Path | None) -> None:
    """What the stage quality measured, also where it was cut, goes beside the results."""
    for name in RUN_FILES:
        if (scratch / "run" / name).exists():
            folder = results.place("gpu-quality", out)
            folder.mkdir(exist_ok=True)
            shutil.copy(scratch / "run" / name, folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that stand alone come before those with many cases: they say most in the least time."""
    cases = Counter(item.nodeid.partition("[")[0] for item in items)
    items.sort(key=lambda item: cases[item.nodeid.partition("[")[0]])


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """A process whose device answers no more ends: its other tests would all fail. pytest-xdist puts a new
    one in its place.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the device answers no more: {error}", returncode=1)


if __name__ == "__main__":
    main()
