"""The page of benchmarks shows what is in the files, and nothing else."""

import json

import pytest

from bench import report
from bench.results import RESULTS, ROOT

ORIGIN = {
    "commit": "abc1234",
    "processor": "a processor",
    "threads": 1,
    "gpus": [],
    "started": "2026-01-02T03:04:05",
    "versions": {"torch": "9.9"},
}


@pytest.fixture
def page(tmp_path):
    """The page of files {machine/date-name: measured}."""

    def page(files):
        for place, measured in files.items():
            path = tmp_path / "results" / f"{place}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"name": place.split("-", 3)[-1], **ORIGIN, **measured}))
        return report.page(tmp_path / "results", tmp_path)

    return page


def test_the_committed_page_is_the_one_that_the_results_give(tmp_path):
    committed = (ROOT / "docs" / "benchmarks.md").read_text()
    assert len(committed.split()) <= 1500
    # Links are relative to where the page lies, so it is made beside the results.
    (tmp_path / "bench").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").symlink_to(RESULTS)
    assert report.page(tmp_path / "bench" / "results", tmp_path / "docs") == committed


def test_contenders_become_columns_under_their_origin(page):
    rows = {
        "ours": {"seconds": 0.25, "ratio_to_ours": 1.0},
        "lightly": {"seconds": 0.5, "ratio_to_ours": 2.0},
        "inf-cl": {"absent": "no GPU"},
    }
    text = page({"cpu/2026-01-02-losses": {"cases": {"clip, forward": {"loss": "clip", "rows": rows}}}})

    assert "2026-01-02, commit abc1234, torch 9.9, a processor, threads: 1." in text
    assert "|  | ours | lightly |\n|---|---|---|\n| clip, forward | 250 ms | × 2.00 |" in text


def test_statistics_over_seeds_become_one_cell_each(page):
    linear = {"linear": {"mean": 0.9, "deviation": 0.0125}, "crowding": {"mean": 0.5, "deviation": 0.25}}
    text = page({"cpu/2026-01-02-study": {"answers": {"simclr": {"mean": {"plain": linear}}}}})
    assert "**simclr**\n\n|  | linear | crowding |\n|---|---|---|\n| plain | 90.0±1.2 | 0.500±0.250 |" in text


def test_the_newest_file_of_a_name_is_shown_and_nothing_that_was_tried_out(page):
    mean = {"plain": {"linear": {"mean": 0.1, "deviation": 0.0}}}
    text = page(
        {
            "cpu/2026-01-02-study": {"mean": mean},
            "cpu/2026-01-03-study": {"mean": {"later": mean["plain"]}},
            "cpu/2026-01-04-study": {"mean": {"tried": mean["plain"]}, "tiny": True},
        }
    )
    assert "| later |" in text and "| plain |" not in text and "| tried |" not in text


def test_a_cut_run_says_so_and_a_page_without_a_gpu_too(page):
    text = page({"cpu/2026-01-02-study": {"complete": False}})
    assert "**Cut**" in text and "Nothing here was measured on a GPU" in text
    assert "Nothing here was measured" not in page({"h200/2026-01-02-study": {}})
