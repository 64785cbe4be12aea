"""Three gloo processes, each with its own shard, against one process with all of it."""

import itertools

import pytest
import torch
from programs.evaluate_ranks import IMAGES, WORLD_SIZE, everything, report
from rank_launch import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank wrote down."""
    return launch(report, WORLD_SIZE, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return everything(torch.arange(IMAGES), torch.arange(10))


def test_shards_are_gathered_in_index_order_on_every_rank(ranks, alone):
    for rank in ranks:
        for name in ("labels", "index"):
            assert rank[name].equal(alone[name])
        for name in ("features", "second_view"):
            torch.testing.assert_close(rank[name], alone[name], rtol=1e-6, atol=1e-6)


def test_a_rank_without_images_and_a_data_set_without_labels_are_gathered_too(ranks, alone):
    for rank in ranks:
        torch.testing.assert_close(rank["unlabelled"], alone["unlabelled"], rtol=1e-6, atol=1e-6)
        assert rank["unlabelled_labels"] is None


def test_every_rank_gets_the_report_of_a_single_process(ranks, alone):
    assert all(
        rank["report"] == ranks[0]["report"] and rank["monitor"] == ranks[0]["monitor"] for rank in ranks
    )
    together, single = ranks[0]["report"]["rows"], alone["report"]["rows"]
    for row, task in itertools.product(("raw pixels", "this run"), ("linear", "few_labels", "knn")):
        assert together[row][task]["accuracy"] == pytest.approx(single[row][task]["accuracy"], abs=1e-9)
    assert ranks[0]["monitor"] == pytest.approx(alone["monitor"])


def test_an_error_on_the_first_rank_is_raised_on_all(ranks):
    assert all("Row 'this run'" in rank["error"] and "NaN" in rank["error"] for rank in ranks)


def test_online_probes_of_all_ranks_equal_one_trained_on_all_rows(ranks, alone):
    for rank, probe in itertools.product(ranks, ("probe", "probe_of_few")):
        for name, value in alone[probe].items():
            assert rank[probe][name].equal(ranks[0][probe][name])
            torch.testing.assert_close(rank[probe][name], value, rtol=1e-4, atol=1e-5)
    mean_loss = torch.stack([rank["probe_losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(mean_loss, alone["probe_losses"], rtol=1e-4, atol=1e-5)
