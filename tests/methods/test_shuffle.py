"""Shuffled batch norm in two processes: their rows, dealt out by one permutation and collected again."""

import pytest
import torch
from programs.shuffle_ranks import report
from rank_launch import launch


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return launch(report, 2, tmp_path_factory.mktemp("ranks"))


def test_rows_are_normalised_among_the_rows_they_were_dealt_to_and_come_back_to_their_place(reports):
    rows = torch.cat([one["rows"] for one in reports])
    found = torch.cat([one["normalised"] for one in reports])
    # Whoever shares a row's statistics shares its shift: with two hands of six the literal result follows
    # from the permutation.
    torch.manual_seed(7)
    order = torch.randperm(12)
    expected = torch.empty_like(rows)
    for hand in order.chunk(2):
        dealt = rows[hand]
        expected[hand] = (dealt - dealt.mean(0)) / (dealt.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected)
    assert torch.equal(torch.cat([one["unchanged"] for one in reports]), rows)
    assert all(len(set((hand < 6).tolist())) == 2 for hand in order.chunk(2))


def test_in_a_task_of_its_own_a_rank_keeps_its_rows(reports):
    for one in reports:
        rows = one["rows"]
        torch.testing.assert_close(
            one["alone"], (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
        )


def test_moco_s_keys_are_normalised_among_shuffled_images(reports):
    first, second = reports
    # The momentum encoder is a batch norm and a linear layer: only the hands that the images were dealt to
    # differ from one process.
    assert not torch.allclose(first["keys shuffled"], first["keys"])
    torch.testing.assert_close(
        torch.cat([first["keys shuffled"], second["keys shuffled"]], dim=1), first["keys by hand"]
    )
