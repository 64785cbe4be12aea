"""Several processes through the trainer: FSDP2 equals DDP, bad numbers are bad on every rank, and runs change
their number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils.other import get_free_port
from programs.training_ranks import MODES, PLAIN
from rank_launch import launch
from small_training import run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl.config import UsageError
from fastgessl.methods import METHODS
from fastgessl.runs import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_images(folder)
    (folder / "port").write_text(str(get_free_port()))
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    return launch(Path(__file__).parents[1] / "programs" / "training_ranks.py", 2, folder)


@pytest.mark.parametrize("label", [*sorted(METHODS), *MODES, "cached"])
def test_fsdp_equals_ddp_and_each_rank_holds_a_part(reports, label):
    for report in reports:
        expected, found = report["ddp", label], report["fsdp", label]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                found["weights"][name],
                weight,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        torch.testing.assert_close(found["features"], expected["features"], rtol=1e-4, atol=1e-5)
        assert expected["share"] > 0.99
        assert found["share"] < 0.6


@pytest.mark.parametrize("label", sorted(METHODS))
def test_a_sharded_run_continues_in_one_process_and_both_logs_are_alike(reports, folder, tmp_path, label):
    logs = [read_lines(folder / kind / label / "metrics.jsonl") for kind in ("ddp", "fsdp")]
    for line, other in zip(*logs, strict=True):
        assert {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in line.items()} == other
    newest = checkpoint.find(folder / "fsdp" / label, "auto")
    training = start(small_config(folder / "images.npz", label, **PLAIN), tmp_path, newest)
    assert training.step == 2
    expected = reports[0]["fsdp", label]["weights"]
    found = training.method.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if "running" not in name)
    moments = training.optimizer.state_dict()["state"]
    assert moments and all(entry["momentum_buffer"].shape for entry in moments.values())


def test_looking_at_the_encoder_during_training_draws_no_random_number(reports):
    drew = {
        key: report[key]["drew"]
        for report in reports
        for key in report
        if isinstance(report[key], dict) and "drew" in report[key]
    }
    assert len(drew) > 20 and not any(drew.values())


def test_keys_passed_around_give_the_weights_of_keys_gathered(reports):
    for report in reports:
        for name, weight in report["global"]["weights"].items():
            torch.testing.assert_close(
                report["ring"]["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name
            )
    assert "byol has none to pass" in reports[0]["nothing to pass"]


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(reports, folder):
    first, second = (report["bad"]["weights"] for report in reports)
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)
    assert all(value.isfinite().all() for value in first.values())
    lines = read_lines(folder / "bad" / "metrics.jsonl")
    assert [line.get("skipped") for line in lines] == [None, 1, None, None]


def test_ranks_with_state_of_their_own_continue_to_the_bit(reports):
    assert [report["resumed"] for report in reports] == [([], 1), ([], 1)]


@pytest.mark.parametrize("label", ["simclr", "moco", "swav"])
def test_two_ranks_then_one_equal_one_rank_all_along(reports, folder, tmp_path, label):
    data = folder / "images.npz"
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    synchronised = {"model": {"batch_norm": "synchronised"}, "method": {"negatives": "global"}}
    config = small_config(data, label, **PLAIN | synchronised)
    run_steps(start(config, whole), whole)
    middle = folder / "ddp" / label / "checkpoints" / "step-000000001"
    run_steps(start(config, changed, middle), changed)
    found, expected = (read_lines(run / "metrics.jsonl")[-1] for run in (changed, whole))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert (
        checkpoint.load(middle)["loader"]
        == checkpoint.load(whole / "checkpoints" / "step-000000001")["loader"]
    )


def test_what_sharding_cannot_do_is_refused_with_the_reason(reports, folder, tmp_path):
    assert "eager mode" in reports[0]["compiled"]
    with pytest.raises(UsageError, match="spreads the weights over several processes"):
        start(small_config(folder / "images.npz", train={"sharding": "fsdp"}), tmp_path)
