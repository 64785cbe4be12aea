"""Training steps are measured as they say, and every trainer does the same work."""

from __future__ import annotations

import pytest
import torch

from bench import peers, steps
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
    assert any(not torch.equal(old, new) for old, new in zip(before, step.trainer.module.parameters(), strict=True))


@pytest.mark.parametrize(("method", "peer"), [(method, peer) for method, made in peers.PEERS.items() for peer in made])
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
