"""The cost of GeSSL and its curves are measured as they say."""

from __future__ import annotations

import json

import torch

from bench import gessl
from bench.memory import peak_bytes


def test_a_step_s_cost_is_relative_to_the_plain_step(monkeypatch):
    monkeypatch.setattr(gessl, "CONTENDERS", {name: gessl.CONTENDERS[name] for name in ("plain", "fast")})
    rows = gessl.cost(images=2, rounds=1)["rows"]
    assert {rows["plain"][f"{key}_ratio"] for key in ("operations", "seconds", "peak")} == {1.0}
    # Of two steps one is plain (3 units) and one has two forwards and a backward's worth more: (3 + 6) / 6 at
    # large batches.
    assert 1.45 < rows["fast"]["operations_ratio"] < 1.55
    assert rows["fast"]["peak_bytes"] > rows["plain"]["peak_bytes"] > 0


def test_both_runs_of_a_seed_start_from_the_same_model_and_are_measured_alike():
    runs = gessl.curves("fast", seeds=1, steps=2)["runs"]
    (ours,), (plain,) = runs["GeSSL"], runs["plain"]
    assert ours[0] == plain[0] and [point["step"] for point in plain] == [0, 1, 2]
    assert ours[-1]["sigma"] != plain[-1]["sigma"]
    json.dumps(runs, allow_nan=False)


def test_live_bytes_end_where_tensors_die_in_a_backward_too():
    weight = torch.nn.Linear(100, 100, bias=False)
    rows = torch.ones(10, 100)
    # Output, its sum and the slopes of both fit in three outputs; the gradient of the weights is its largest
    # part.
    size = peak_bytes(lambda: weight(rows).sum().backward(), weight)
    assert 4 * 100 * 100 <= size <= 4 * (100 * 100 + 4 * 10 * 100)
