"""A target's contenders are compared in one precision, and none of them costs another its row."""

from __future__ import annotations

import sys
import time
from types import ModuleType

import pytest
import torch

from bench import targets
from bench.attempts import failures
from bench.stages import Conditions
from bench.targets import OURS, OURS_FLOAT32, Contender, Target

RATES = {"matmul_bf16_tflops": 1.0, "exp_per_second": 1e9}


def target(name="one", **contenders):
    made = {peer.replace("_", " "): Contender(work) for peer, work in contenders.items()}
    return Target(name, 8, 16, 5, 2, 0.0, lambda query, key: made)


def failing():
    raise TypeError("an unexpected keyword argument")


def dry_run(seconds=60.0):
    return Conditions(time.perf_counter() + seconds, True, None, None, None)


def last(one):
    return list(targets._measurements(one, 8, RATES, 0.0))[-1]


def test_a_peer_that_fails_is_absent_and_the_others_are_measured():
    found = last(target(ours=list, broken=failing, dense=list))["contenders"]
    assert found["broken"]["absent"] == "TypeError('an unexpected keyword argument')"
    assert found["ours"]["seconds"] > 0 and found["dense"]["ratio_to_ours"] > 0
    assert not failures(found)


def test_our_own_failure_is_an_error_after_which_other_targets_go_on(monkeypatch):
    monkeypatch.setattr(
        targets, "TARGETS", (target("bad", ours=failing, dense=list), target("good", ours=list))
    )
    rows = dict(targets.rows(dry_run()))
    assert "TypeError" in rows["bad"]["contenders"]["ours"]["error"] and rows["bad"]["seconds"] is None
    assert "absent" in rows["bad"]["contenders"]["dense"]
    assert rows["good"]["seconds"] > 0
    assert failures(rows) == ["bad, contenders, ours"]


def test_our_row_is_there_before_a_peer_runs():
    first = next(
        iter(targets._measurements(target(ours=list, peer=lambda: pytest.fail("ran")), 8, RATES, 0.0))
    )
    assert list(first["contenders"]) == ["ours"] and first["seconds"] > 0


def test_targets_without_time_say_so(monkeypatch):
    monkeypatch.setattr(targets, "TARGETS", (target("late", ours=list),))
    monkeypatch.setattr(targets, "ceilings", lambda conditions: iter(()))
    assert dict(targets.rows(dry_run(0.0)))["late"] == {"absent": "no time was left"}


def test_inf_cl_gets_the_width_of_its_operands_and_is_compared_with_ours_in_float32(monkeypatch):
    """Inf-CL's function as version 1.2.1 has it: it views operands as heads of `head_dim`, 256 if nothing is
    said, and wants float32.
    """
    dtypes = []

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        dtypes.append(q.dtype)
        q, k = (scale * q).view(len(q), -1, head_dim).float(), k.view(len(k), -1, head_dim).float()
        return torch.einsum("mhd,nhd->mn", q, k).logsumexp(1) - torch.einsum("mhd,mhd->m", q, k)

    package = ModuleType("inf_cl")
    package.cal_flash_loss = cal_flash_loss
    monkeypatch.setitem(sys.modules, "inf_cl", package)
    query, key = targets._operands(64, 128)
    contenders = targets.INFO_NCE(query, key)
    found = {name: contenders[name].work() for name in (OURS, OURS_FLOAT32, "inf-cl")}
    assert set(dtypes) == {torch.float32} and {part.dtype for part in found[OURS]} == {torch.bfloat16}
    for ours, peer in zip(found[OURS_FLOAT32], found["inf-cl"], strict=True):
        torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-7)
    assert contenders["inf-cl"].beside == OURS_FLOAT32 and "TF32" in contenders["inf-cl"].precision
    assert contenders[OURS_FLOAT32].precision != contenders[OURS].precision


def test_each_target_starts_with_nothing_compiled(monkeypatch):
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(any(isinstance(part, torch.SymInt) for part in example_inputs))
        return graph

    dense = torch.compile(lambda query, key: (query @ key.T).sum(), backend=backend)
    made = Target("t", 8, 16, 5, 2, 0.0, lambda query, key: {OURS: Contender(lambda: dense(query, key))})
    for rows in (8, 16, 32):
        assert "seconds" in list(targets._measurements(made, rows, RATES, 0.0))[-1]["contenders"][OURS]
    assert compiled == [False, False, False]
