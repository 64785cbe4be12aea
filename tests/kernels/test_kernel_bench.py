"""The losses' benchmark: peers compute the same loss, work is counted by formula, what is absent says why,
one command does all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench import kernel_cases
from bench.kernel_cases import PASSES, PEERS, Case, obstacle, operands

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "loss, peer",
    [
        (loss, peer)
        for loss, peers in PEERS.items()
        for peer in peers
        if peer not in ("ours", "compiled dense")
    ],
)
def test_a_peer_computes_the_same_loss_and_gradients(loss, peer):
    reason = obstacle(Case(loss, "backward", 20, peer), "cpu")
    if reason:
        pytest.skip(reason)
    query, key = operands(20, "cpu", torch.float32)
    ours, theirs = (PEERS[loss][name](query, key) for name in ("ours", peer))
    tolerance = {"rtol": 3e-2, "atol": 1e-3} if "autocast" in loss else {}
    torch.testing.assert_close(ours.float(), theirs.float(), **tolerance)
    for found, expected in zip(
        torch.autograd.grad(ours, (query, key)), torch.autograd.grad(theirs, (query, key)), strict=True
    ):
        assert (found - expected).norm() <= (5e-2 if "autocast" in loss else 1e-5) * expected.norm()


def test_work_is_counted_by_the_formula():
    assert Case("info_nce", "forward", 10, "ours").operations == 2 * 10 * 10 * 128
    assert Case("nt_xent", "backward", 10, "ours").operations == 1.5 * 2 * 20 * 20 * 128
    assert Case("clip", "double backward", 10, "ours").operations == 9 * 2 * 10 * 10 * 128


def test_the_floor_is_the_larger_of_matmuls_and_exponentials(monkeypatch):
    case = Case("info_nce", "forward", 100, "ours")
    monkeypatch.setattr(
        kernel_cases, "rates", lambda device, dtype: {"operations": 2 * 128.0, "exponentials": 4.0}
    )
    assert kernel_cases.floor_seconds(case, "cpu", torch.float32) == 100 * 100
    monkeypatch.setattr(
        kernel_cases, "rates", lambda device, dtype: {"operations": 2 * 128.0, "exponentials": 0.5}
    )
    assert kernel_cases.floor_seconds(case, "cpu", torch.float32) == 100 * 100 / 0.5


@pytest.mark.parametrize(
    "case, reason",
    [
        (Case("info_nce", "backward", 1 << 20, "ours"), "minutes a call"),
        (
            Case("info_nce", "double backward", 1024, "compiled dense"),
            "compiled dense has no second derivative",
        ),
        (Case("info_nce", "backward", 60_000, "dense"), r"its table needs about 67 GiB"),
    ],
)
def test_what_is_left_out_says_why(case, reason, monkeypatch):
    monkeypatch.setattr(kernel_cases, "available_bytes", lambda device: 100 * 2**30)
    assert obstacle(case, "cpu") == reason


def test_one_command_measures_prints_stores_and_plots(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.kernels",
        "--rows",
        "16",
        "--seconds",
        "0.001",
        "--out",
        str(tmp_path),
    ]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    (path,) = tmp_path.glob("*/*-kernels-rows.json")
    record = json.loads(path.read_text())
    alone = {(row["loss"], row["pass"], row["peer"]): row for row in record["rows"] if "ranks" not in row}
    assert set(alone) == {
        (loss, pass_, peer) for loss, peers in PEERS.items() for pass_ in PASSES for peer in peers
    }
    for (loss, pass_, peer), row in alone.items():
        if "absent" not in row:
            case = Case(loss, pass_, 16, peer)
            assert (
                row["tflops"] == pytest.approx(case.operations / row["seconds"] / 1e12)
                and row["median_seconds"] >= row["seconds"]
            )
        else:
            assert peer not in ("ours", "dense", "lightly") and row["absent"]
    ranks = [row for row in record["rows"] if row.get("ranks") == 2]
    assert [row["peer"] for row in ranks] == ["ours, gather", "ours, ring", "OpenCLIP's gather"]
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "info_nce" in found.stdout and "on 2 ranks" in found.stdout
