"""Everything a GPU can tell, in order of value: `python -m bench.gpu [--stage ceilings tests ...] [--budget
540] [--out DIR] [--dry-run]`.

Each stage runs in a process of its own under its own time limit and writes its JSON under
bench/results/<gpu>/ after every row, so that a crash or a cut run leaves what was found until then. --budget
divides the time of the whole call among its stages. What the machine lacks (a peer, DALI, a second GPU,
CIFAR-10, room for a case) becomes a row "absent"; what of ours fails is a row "error", a failed stage and an
exit code other than 0. `--dry-run` takes tiny sizes, on a CPU if need be. `--profile` adds a trace of a
training step and Nsight Compute's view of the slowest kernel.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import processes, results
from bench.attempts import failures
from bench.stages import STAGES, Conditions

SECONDS = {
    "ceilings": 60,
    "tests": 420,
    "kernels": 300,
    "steps": 420,
    "engines": 120,
    "quality": 900,
    "scaling": 300,
    "gessl": 200,
}
START_AND_LAST_ROW = 60
"""Seconds after which a stage is killed, beyond the limit at which it stops by itself: it looks at the clock
between rows."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=[stage for stage in STAGES if stage != "profile"]
    )
    parser.add_argument("--seconds", type=float, help="time limit of a stage, instead of its own")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds for the whole call, divided among its stages"
    )
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    parser.add_argument(
        "--cifar10",
        type=Path,
        help="an .npz with CIFAR-10 (train_x, train_y, test_x, test_y), for the stage quality",
    )
    parser.add_argument("--photos", type=Path, help="a folder of photos, for the engines that read files")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU if there is no GPU")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the stage profile too: a torch profiler trace, Nsight Compute's summary",
    )
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available() and not arguments.dry_run:
        sys.exit("bench.gpu: torch finds no GPU here. Run it on a machine that has one, or with --dry-run.")
    # So that a call that is ended from outside ends its stages too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if arguments.in_this_process:
        run(arguments.stage[0], arguments)
        return
    stages = list(dict.fromkeys([*arguments.stage, *(["profile"] if arguments.profile else [])]))
    failed = run_all(stages, words, [limit(stage, arguments) for stage in stages], arguments.budget)
    if failed:
        sys.exit(
            f"bench.gpu: {', '.join(failed)} did not end well; what was found until then is in the files "
            "above."
        )


def limit(stage: str, arguments: argparse.Namespace) -> float:
    return arguments.seconds or SECONDS.get(stage, 120)


def run_all(stages: Sequence[str], words: Sequence[str], limits: Sequence[float], budget: float) -> list[str]:
    """Every stage in a process of its own, one after the other; returns those that did not end by themselves
    without an error.
    """
    ends, failed = time.monotonic() + budget, []
    for number, stage in enumerate(stages):
        stops, killed = allowance(limits[number:], ends - time.monotonic())
        if not run_apart(stage, words, stops, killed):
            failed.append(stage)
    return failed


def allowance(limits: Sequence[float], left: float) -> tuple[float, float]:
    """Seconds after which the first of some stages stops, and after which it is killed, when all of them
    together have `left` seconds.

    It gets the part of what is left that it would take of their limits; what it does not use is there for the
    next ones.

    >>> allowance([60, 420, 300], math.inf)
    (60, 120)
    >>> allowance([60, 420, 300], 480)
    (30.0, 60.0)
    >>> allowance([300], 390)
    (300, 360)
    """
    longest = [own + START_AND_LAST_ROW for own in limits]
    killed = min(longest[0], left * longest[0] / sum(longest))
    return max(killed - START_AND_LAST_ROW, killed / 2), killed


def run_apart(stage: str, words: Sequence[str], stops: float, killed: float) -> bool:
    """Whether it ended by itself without an error."""
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        *words,
        "--in-this-process",
        "--stage",
        stage,
        "--seconds",
        str(stops),
    ]
    ended = processes.run(command, killed, capture=False)
    if ended.exit_code is None:
        print(
            f"{stage}: killed after {killed:.0f} s; it should have stopped by itself after {stops:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return ended.exit_code == 0


def run(stage: str, arguments: argparse.Namespace) -> None:
    """Write the stage's record after each of its rows. Exits with a message if something of ours failed in
    one.
    """
    started = time.perf_counter()
    conditions = Conditions(
        started + limit(stage, arguments),
        arguments.dry_run,
        arguments.cifar10,
        arguments.photos,
        arguments.out,
    )
    record: dict[str, Any] = {
        "dry_run": arguments.dry_run,
        "limit_seconds": limit(stage, arguments),
        "complete": False,
        "rows": {},
    }
    record["state_before"] = gpu_state()
    path = results.write(f"gpu-{stage}", record, arguments.out)
    for name, row in STAGES[stage](conditions):
        record["rows"][name] = row
        record["seconds"] = time.perf_counter() - started
        path = results.write(f"gpu-{stage}", record, arguments.out)
        print(f"{stage}: {name}: {_short(row)}", flush=True)
    failed = failures(record["rows"])
    results.write(
        f"gpu-{stage}",
        record | {"complete": True, "failed": failed, "state_after": gpu_state()},
        arguments.out,
    )
    print(f"  {path}", flush=True)
    if failed:
        sys.exit(f"{stage}: failed: {'; '.join(failed)}")


def gpu_state() -> str:
    """Driver, clocks, power and temperature as nvidia-smi gives them; they are read, never set."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "absent: nvidia-smi"
    return said.stdout.strip()


def _short(row: Any) -> str:
    text = (
        str({key: value for key, value in row.items() if key not in ("samples", "output")})
        if isinstance(row, dict)
        else str(row)
    )
    return text if len(text) < 400 else text[:400] + " ..."


if __name__ == "__main__":
    main()
