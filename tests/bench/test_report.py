"""The page of benchmarks shows what is in the files, and nothing else."""

from __future__ import annotations

import json

import pytest

from bench import report

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


def test_rows_become_a_table_under_their_origin(page):
    text = page(
        {
            "cpu/2026-01-02-kernels": {
                "rows": [
                    {"loss": "clip", "seconds": 0.25, "samples": [1, 2]},
                    {"loss": "sigma", "absent": "no GPU"},
                ]
            }
        }
    )

    assert "2026-01-02, commit abc1234, torch 9.9, a processor, 1 threads" in text
    assert "| loss | seconds | absent |\n|---|---|---|\n| clip | 0.25 |  |\n| sigma |  | no GPU |" in text
    assert "| samples" not in text


def test_statistics_over_seeds_become_one_cell_each(page):
    answer = {
        "mean": {"plain": {"linear": {"mean": 0.9, "deviation": 0.0125}}},
        "paired": {"GeSSL": {"plain": {"linear": {"mean": -0.01, "low": -0.02, "high": 0.004}}}},
        "curves": {"plain": [{"step": 0, "sigma": 0.5}]},
    }

    text = page({"cpu/2026-01-02-study": {"answers": {"simclr": answer}}})

    assert "**answers, simclr, mean**\n\n|  | linear |\n|---|---|\n| plain | 0.900 ± 0.013 |" in text
    assert (
        "**answers, simclr, paired, GeSSL**\n\n|  | linear |\n|---|---|\n| plain | -0.010 [-0.020, +0.004] |"
        in text
    )
    assert "**answers, simclr, curves, plain**\n\n| step | sigma |\n|---|---|\n| 0 | 0.5 |" in text


def test_a_file_of_single_numbers_is_a_list_of_them(page):
    assert "|  | value |\n|---|---|\n| probe_seconds | 34 |" in page(
        {"cpu/2026-01-02-evaluate": {"probe_seconds": 34.0}}
    )


def test_the_newest_file_of_a_name_is_shown_and_no_dry_run(page):
    text = page({
        "cpu/2026-01-02-evaluate": {"probe_seconds": 34.0},
        "cpu/2026-01-03-evaluate": {"probe_seconds": 12.0},
        "cpu/2026-01-04-evaluate": {"probe_seconds": 99.0, "dry_run": True},
    })  # fmt: skip

    assert "12" in text and "| 34 |" not in text and "| 99 |" not in text


def test_a_cut_run_says_so_and_a_page_without_a_gpu_too(page):
    text = page({"cpu/2026-01-02-steps": {"complete": False, "rows": [{"case": "a", "seconds": 1.0}]}})

    assert "**Cut**" in text and "Nothing here was measured on a GPU" in text
    assert "Nothing here was measured on a GPU" not in page(
        {"h200/2026-01-02-steps": {"rows": [{"case": "a", "seconds": 1.0}]}}
    )
