"""Training steps are measured as they say, and every trainer does the same work."""

from __future__ import annotations

import pytest
import torch

from bench import peers, steps
from bench.attempts import failures
from fastgessl.config import GesslConfig, MethodConfig
from fastgessl.models import build_backbone
from fastgessl.recipes import load

CASE = steps.TINY_CASES["simclr-resnet18-16"]


def step_of(trainer):
    device = torch.device("cpu")
    return steps.Step(trainer, steps.batches_of(CASE, device), device)


def test_the_parts_of_a_step_are_all_timed_and_sigma_takes_time_under_gessl_only():
    plain = steps.split(step_of(steps.ours(CASE, GesslConfig())), rounds=2)
    exact = steps.split(step_of(steps.ours(CASE, load("digits-simclr-gessl-exact").config.gessl)), rounds=2)
    assert set(plain) == set(exact) == {"data", "targets", "forward", "loss", "sigma", "backward", "update"}
    assert plain["sigma"] < plain["forward"] < exact["sigma"]


def test_a_step_moves_the_weights_of_our_own_trainer():
    step = step_of(steps.ours(CASE, GesslConfig()))
    before = [parameter.clone() for parameter in step.trainer.module.parameters()]
    step.group()
    assert any(
        not torch.equal(old, new) for old, new in zip(before, step.trainer.module.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("method", "peer"), [(method, peer) for method, made in peers.PEERS.items() for peer in made]
)
def test_another_trainer_s_step_trains_the_same_kind_of_backbone(method, peer):
    if not peers.installed(peer):
        pytest.skip(f"{peer} is not installed")
    config = MethodConfig(name=method, projector_hidden=16, projector_out=8, predictor_hidden=16)
    torch.manual_seed(0)
    backbone = build_backbone(CASE.model)
    step = step_of(peers.PEERS[method][peer](backbone, config))
    before = [parameter.clone() for parameter in backbone.parameters()]
    step.group()
    step.group()
    assert any(not torch.equal(old, new) for old, new in zip(before, backbone.parameters(), strict=True))


def test_a_trainer_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(steps, "installed", lambda peer: False)
    rows = steps.measure(CASE, rounds=3, seconds=0.0)["rows"]
    assert rows["lightly"] == rows["stable-pretraining"] == {"absent": "not installed"}
    assert rows["ours"]["ratio_to_ours"] == 1.0


def contenders_with(monkeypatch, **made):
    """A case's contenders: ours, these, and lightly; a class of an exception stands for one that raises it."""

    def broken(error):
        raise error("tried to allocate 20 GiB")

    def contenders(case):
        extra = {name.replace("_", " "): lambda error=error: broken(error) for name, error in made.items()}
        return {
            steps.PLAIN: lambda: steps.ours(case, GesslConfig()),
            **extra,
            "GeSSL, last": lambda: steps.ours(case, GesslConfig()),
        }

    monkeypatch.setattr(steps, "contenders", contenders)


def test_neither_a_peer_that_fails_nor_a_step_without_room_takes_the_others_along(monkeypatch):
    contenders_with(
        monkeypatch,
        lightly=AssertionError,
        **{"GeSSL,_exact": torch.OutOfMemoryError, "ours,_compiled": RuntimeError},
    )
    so_far = list(steps.measurements(CASE, rounds=3, seconds=600.0))
    assert [len(record["rows"]) for record in so_far] == [1, 2, 3, 4, 5]
    rows = so_far[-1]["rows"]
    assert rows["lightly"] == {"absent": "AssertionError('tried to allocate 20 GiB')"}
    assert rows["GeSSL, exact"] == {"absent": "OutOfMemoryError('tried to allocate 20 GiB')"}
    assert rows["ours"]["seconds"] > 0 and rows["GeSSL, last"]["ratio_to_ours"] > 0
    assert failures(so_far[-1]) == ["rows, ours, compiled"]
    assert steps.table("a case", so_far[-1]).row_count == 5


def test_without_our_own_step_the_case_is_an_error(monkeypatch):
    contenders_with(monkeypatch)
    monkeypatch.setattr(steps, "ours", lambda *_: None)
    record = steps.measure(CASE, rounds=3, seconds=600.0)
    assert failures(record) == ["rows, ours"] and "absent" in record["rows"]["GeSSL, last"]


def test_contenders_without_time_say_so_and_ours_is_measured_all_the_same():
    rows = steps.measure(CASE, rounds=3, seconds=0.0)["rows"]
    assert rows["ours"]["seconds"] > 0
    assert {row["absent"] for name, row in rows.items() if name != "ours"} <= {
        "no time was left",
        "not installed",
    }
