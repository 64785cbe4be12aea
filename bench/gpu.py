"""Everything a GPU can tell, in order of value: `python -m bench.gpu [--stage ceilings tests ...] [--seconds 300] [--out DIR] [--dry-run]`.

Each stage runs in a process of its own under its own time limit and writes its JSON under bench/results/<gpu>/ after every row, so that a
crash or a cut run leaves what was found until then. What the machine lacks (a peer, DALI, a second GPU, CIFAR-10) becomes a row "absent".
`--dry-run` takes tiny sizes, on a CPU if need be. `--profile` adds a trace of a training step and Nsight Compute's view of the slowest
kernel.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.stages import STAGES, Conditions

SECONDS = {"ceilings": 60, "tests": 420, "kernels": 300, "steps": 420, "engines": 120, "quality": 900, "scaling": 300, "gessl": 200}
START_AND_LAST_ROW = 60
"""Seconds beyond its limit after which a stage is killed: it looks at the clock between rows, and a row may compile."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=[stage for stage in STAGES if stage != "profile"])
    parser.add_argument("--seconds", type=float, help="time limit of a stage, instead of its own")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    parser.add_argument("--cifar10", type=Path, help="an .npz with CIFAR-10 (train_x, train_y, test_x, test_y), for the stage quality")
    parser.add_argument("--photos", type=Path, help="a folder of photos, for the engines that read files")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU if there is no GPU")
    parser.add_argument("--profile", action="store_true", help="the stage profile too: a torch profiler trace, Nsight Compute's summary")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available() and not arguments.dry_run:
        sys.exit("bench.gpu: torch finds no GPU here. Run it on a machine that has one, or with --dry-run.")
    if arguments.in_this_process:
        run(arguments.stage[0], arguments)
        return
    stages = list(dict.fromkeys([*arguments.stage, *(["profile"] if arguments.profile else [])]))
    failed = [stage for stage in stages if not run_apart(stage, words, limit(stage, arguments))]
    if failed:
        sys.exit(f"bench.gpu: {', '.join(failed)} did not end well; what was found until then is in the files above.")


def limit(stage: str, arguments: argparse.Namespace) -> float:
    return arguments.seconds or SECONDS.get(stage, 120)


def run_apart(stage: str, words: Sequence[str], seconds: float) -> bool:
    """The stage in a process of its own; returns whether it ended by itself without an error."""
    command = [sys.executable, "-m", "bench.gpu", *words, "--in-this-process", "--stage", stage]
    try:
        return subprocess.run(command, cwd=results.ROOT.parent, timeout=seconds + START_AND_LAST_ROW, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{stage}: killed {START_AND_LAST_ROW} s beyond its limit of {seconds:g} s", file=sys.stderr, flush=True)
        return False


def run(stage: str, arguments: argparse.Namespace) -> None:
    """Write the stage's record after each of its rows."""
    started = time.perf_counter()
    conditions = Conditions(started + limit(stage, arguments), arguments.dry_run, arguments.cifar10, arguments.photos, arguments.out)
    record: dict[str, Any] = {"dry_run": arguments.dry_run, "limit_seconds": limit(stage, arguments), "complete": False, "rows": {}}
    record["state_before"] = gpu_state()
    path = results.write(f"gpu-{stage}", record, arguments.out)
    for name, row in STAGES[stage](conditions):
        record["rows"][name] = row
        record["seconds"] = time.perf_counter() - started
        path = results.write(f"gpu-{stage}", record, arguments.out)
        print(f"{stage}: {name}: {_short(row)}", flush=True)
    results.write(f"gpu-{stage}", record | {"complete": True, "state_after": gpu_state()}, arguments.out)
    print(f"  {path}", flush=True)


def gpu_state() -> str:
    """Driver, clocks, power and temperature as nvidia-smi gives them; they are read, never set."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        said = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "absent: nvidia-smi"
    return said.stdout.strip()


def _short(row: Any) -> str:
    text = str({key: value for key, value in row.items() if key not in ("samples", "output")}) if isinstance(row, dict) else str(row)
    return text if len(text) < 400 else text[:400] + " ..."


if __name__ == "__main__":
    main()
