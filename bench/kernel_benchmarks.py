"""The comparison of `bench.kernels` as a pytest-benchmark suite: `pytest bench/kernel_benchmarks.py`.

FASTGESSL_BENCH_ROWS (comma-separated) and FASTGESSL_BENCH_SECONDS (of one measurement) choose what is
measured; the GPU is used if there is one. Peers of a comparison follow one another; a case that cannot be
measured is skipped with the reason.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench.kernel_cases import PASSES, PEERS, Case, floor_seconds, obstacle, operands, peak_bytes, run
from bench.timing import clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ROWS = os.environ.get("FASTGESSL_BENCH_ROWS") or (
    "256,1024,4096,16384,32768" if DEVICE == "cuda" else "256,512,1024,2048,4096"
)
SECONDS = float(os.environ.get("FASTGESSL_BENCH_SECONDS") or 1.0)
CASES = [
    Case(loss, pass_, rows, peer)
    for loss, peers in PEERS.items()
    for rows in map(int, ROWS.split(","))
    for pass_ in PASSES
    for peer in peers
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pass(case, benchmark):
    reason = obstacle(case, DEVICE)
    if reason:
        pytest.skip(reason)
    query, key = operands(case.rows, DEVICE, DTYPE)
    benchmark.group = f"{case.loss}, {case.pass_}, {case.rows:,} rows"
    for _ in range(2):
        started = clock()()
        run(case, query, key)
    rounds = max(5, min(1000, round(SECONDS / (clock()() - started))))
    benchmark.pedantic(run, args=(case, query, key), rounds=rounds)
    best = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "tflops": case.operations / best / 1e12,
        "fraction_of_floor_rate": floor_seconds(case, DEVICE, DTYPE) / best,
    }
    if case.pass_ == "backward" and case.rows >= 2048:  # below, a process's memory says nothing
        benchmark.extra_info["peak_bytes"] = peak_bytes(case, DEVICE, DTYPE)
