"""The similarity losses against dense PyTorch and other packages: time, memory, rates, plots.

`python -m bench.kernels [--rows 256 1024 …] [--seconds 1] [--out DIR]`, on the GPU if there is one; D = 128.
Runs the pytest-benchmark suite `bench/kernel_benchmarks.py` and two ranks (`bench/kernel_ranks.py`), prints a
table, and writes JSON and plots. A time is the best of its rounds, as a shared machine only ever adds to it,
and on one CPU thread the process's own time; the median is stored beside. Memory is the peak above the
inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_cases, results
from bench.kernel_cases import FEATURES, PASSES, PEERS, TEMPERATURE, Case, in_a_process, obstacle
from bench.timing import clock
from fastgessl.kernels import implementation_for

SUITE = results.ROOT / "kernel_benchmarks.py"
LARGE = (16_384, 65_536)


class Absent:
    """Reasons of the cases that the suite skipped."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.nodeid.split("[", 1)[1].rstrip("]")] = report.longrepr[2].removeprefix(
                "Skipped: "
            )


def measure(rows: list[int], seconds: float) -> list[dict[str, Any]]:
    """Rows of the result file. Raises RuntimeError if a case failed."""
    # Benchmarks would be switched off in a worker of a parallel test run.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    os.environ |= {"FASTGESSL_BENCH_ROWS": ",".join(map(str, rows)), "FASTGESSL_BENCH_SECONDS": str(seconds)}
    absent = Absent()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        timer = f"time.{clock().__name__}"
        options = [
            "-q",
            "-p",
            "no:xdist",
            "--benchmark-timer",
            timer,
            "-p",
            "no:cacheprovider",
            "--benchmark-json",
            str(path),
            "--benchmark-columns",
            "min,median,rounds",
        ]
        code = pytest.main(
            [str(SUITE), *options, "--benchmark-disable-gc", "--rootdir", str(results.ROOT.parent)],
            plugins=[absent],
        )
        if code != pytest.ExitCode.OK:
            raise RuntimeError(
                f"the suite {SUITE.name} ended with exit code {int(code)}: see its report above."
            )
        benchmarks = json.loads(path.read_text())["benchmarks"]
    return [_measured(part) for part in benchmarks] + [
        _absent(name, reason) for name, reason in absent.reasons.items()
    ]


def measure_large(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Forward and backward on a CPU where a call takes minutes: one call each, its time and memory from a
    process of its own.
    """
    rows = []
    for size in sizes:
        for case in (
            Case(loss, "backward", size, peer)
            for loss in PEERS
            for peer in ("ours", "dense")
            if "dense" in PEERS[loss]
        ):
            reason = obstacle(case, "cpu")
            row = {"loss": case.loss, "pass": case.pass_, "rows": size, "peer": case.peer}
            rows.append(row | ({"absent": reason} if reason else in_a_process(case) | {"rounds": 1}))
            print(rows[-1], flush=True)
    return rows


def _measured(part: dict[str, Any]) -> dict[str, Any]:
    loss, pass_, rows, peer = _split(part["param"])
    stats = part["stats"]
    times = {"seconds": stats["min"], "median_seconds": stats["median"], "rounds": stats["rounds"]}
    return {"loss": loss, "pass": pass_, "rows": rows, "peer": peer} | times | part["extra_info"]


def _split(name: str) -> tuple[str, str, int, str]:
    loss, pass_, rows, peer = name.split(", ", 3)
    return loss, pass_, int(rows.removesuffix(" rows")), peer


def _absent(name: str, reason: str) -> dict[str, Any]:
    loss, pass_, rows, peer = _split(name)
    return {"loss": loss, "pass": pass_, "rows": rows, "peer": peer, "absent": reason}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a comparison: our milliseconds, and every peer's with ours as a multiple of it."""
    lines = []
    measured = [row for row in rows if "seconds" in row]
    for loss, pass_, size, ranks in dict.fromkeys(
        (row["loss"], row["pass"], row["rows"], row.get("ranks", 1)) for row in measured
    ):
        group = [
            row
            for row in measured
            if (row["loss"], row["pass"], row["rows"], row.get("ranks", 1)) == (loss, pass_, size, ranks)
        ]
        ours = group[0]["seconds"]
        others = "  ".join(
            f"{row['peer']} {1e3 * row['seconds']:.3g} ms ({ours / row['seconds']:.2f}x)" for row in group[1:]
        )
        where = f" on {ranks} ranks" if ranks > 1 else ""
        lines.append(
            f"{loss:16} {pass_:15} {size:7,} rows{where}: {group[0]['peer']} {1e3 * ours:.3g} ms  {others}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of each pass, and memory, against the number of rows, log-log, every peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(
        len(PASSES) + 1, len(PEERS), figsize=(4.2 * len(PEERS), 2.8 * (len(PASSES) + 1)), squeeze=False
    )
    alone = [row for row in rows if row.get("ranks", 1) == 1]
    for column, loss in enumerate(PEERS):
        for line, (pass_, field, unit) in enumerate(
            [*((pass_, "seconds", 1e-3) for pass_ in PASSES), ("backward", "peak_bytes", 2**20)]
        ):
            axis = axes[line][column]
            mine = [row for row in alone if (row["loss"], row["pass"]) == (loss, pass_) and row.get(field)]
            for name in dict.fromkeys(row["peer"] for row in mine):
                points = sorted((row["rows"], row[field] / unit) for row in mine if row["peer"] == name)
                axis.loglog(*zip(*points, strict=True), marker="o", label=name)
            axis.set(
                title=f"{loss}, {'memory of ' if field == 'peak_bytes' else ''}{pass_}",
                ylabel="MiB" if field == "peak_bytes" else "ms",
            )
            axis.xaxis.set_minor_formatter(NullFormatter())
            if mine:
                axis.legend(fontsize=7)
        axes[-1][column].set(xlabel=f"rows (pairs), D = {FEATURES}")
    figure.tight_layout()
    figure.savefig(path, dpi=60, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help="rows of each operand, instead of 256 to 65,536 on a CPU, to 131,072 on a GPU",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = arguments.rows or (
        [256, 1024, 4096, 16384, 32768, 131072] if device == "cuda" else [256, 512, 1024, 2048, 4096]
    )
    chosen, why = implementation_for(torch.empty(1, 1, device=device, dtype=dtype))
    print(
        f"{device}, {dtype}: large tables by {chosen} ({why}), {torch.get_num_threads()} threads", flush=True
    )
    measured = measure(rows, arguments.seconds)
    if device == "cpu" and not arguments.rows:
        measured += measure_large(LARGE)
    from bench.kernel_ranks import measure as measure_ranks

    measured += measure_ranks(min(1024, max(rows)), 10 * arguments.seconds)
    print(table(measured))
    settings = {"device": device, "dtype": str(dtype), "features": FEATURES, "temperature": TEMPERATURE}
    settings |= {"clock": clock().__name__}
    name = "kernels-rows" if arguments.rows else "kernels"
    path = results.write(
        name, settings | {"rates": kernel_cases.rates(device, dtype), "rows": measured}, arguments.out
    )
    plot(measured, path.with_suffix(".png"))
    print(path, path.with_suffix(".png"), sep="\n")


if __name__ == "__main__":
    main()
