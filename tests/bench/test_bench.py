"""The measuring programs run, and what they write can be believed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from bench import digits, results

ROOT = Path(__file__).resolve().parents[2]


def test_a_result_names_versions_processor_and_commit(tmp_path):
    path = results.write("trial", {"answer": [1, 2]}, tmp_path)
    record = json.loads(path.read_text())
    assert record["answer"] == [1, 2]
    assert {"commit", "processor", "threads", "versions", "python", "gpus"} <= set(record)
    assert path.parent == tmp_path / results.machine()


def test_the_gpu_program_tries_itself_out_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--stage", "ceilings", "--seconds", "3", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    records = {path.stem.split("-")[-1]: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    assert all(record["dry_run"] for record in records.values())
    assert all(records["ceilings"][name] > 0 for name in ("matmul_bf16_tflops", "copy_gb_per_second", "exp_per_second"))


def test_paired_differences_have_students_interval():
    seeds = [
        {row: {key: base + gain * (row == "GeSSL") for key, _ in digits.MEASURES} for row in (*digits.BASELINES, *digits.TRAINED)}
        for base, gain in ((0.5, 0.1), (0.7, 0.2), (0.6, 0.4))
    ]
    paired = digits._differences(seeds)["raw pixels"]["knn"]
    low, high = stats.t.interval(0.95, 2, loc=statistics.mean([0.1, 0.2, 0.4]), scale=stats.sem([0.1, 0.2, 0.4]))
    assert (paired["mean"], paired["low"], paired["high"]) == pytest.approx((0.7 / 3, low, high))
