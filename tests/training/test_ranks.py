"""Several processes through the trainer: FSDP2 equals DDP, bad numbers are bad on every rank, and runs change
their number of ranks.
"""

import pytest
import torch
from programs.training_ranks import MODES, PLAIN, report
from rank_launch import launch
from small_training import run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl.config import UsageError
from fastgessl.methods import METHODS
from fastgessl.runs import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("ranks")).parent


@pytest.fixture(scope="module")
def reports(folder):
    return launch(report, 2, folder)


@pytest.mark.parametrize("label", [*sorted(METHODS), *MODES, "cached"])
def test_fsdp_equals_ddp_and_each_rank_holds_a_part(reports, label):
    for one in reports:
        expected, found = one["ddp", label], one["fsdp", label]
        for part in ("weights", "features"):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-5)
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
    drew = [found["drew"] for one in reports for found in one.values() if "drew" in found]
    assert len(drew) > 40 and not any(drew)


def test_keys_passed_around_give_the_weights_of_keys_gathered(reports):
    for one in reports:
        found, expected = one["ring"]["weights"], one["global"]["weights"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert "byol has none to pass" in reports[0]["nothing to pass"]


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(reports, folder):
    first, second = (one["bad"]["weights"] for one in reports)
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)
    assert all(value.isfinite().all() for value in first.values())
    lines = read_lines(folder / "bad" / "metrics.jsonl")
    assert [line.get("skipped") for line in lines] == [None, 1, None, None]


def test_ranks_with_state_of_their_own_continue_to_the_bit(reports):
    assert [one["resumed"] for one in reports] == [([], 1), ([], 1)]


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
