"""docs/evaluation.md shows tables that were printed, and where from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.studies import evaluation_tables
from fastgessl.recipes import load, override

ROOT = Path(__file__).resolve().parents[2]


def test_every_table_of_the_page_stands_in_the_file_that_it_names():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    named = re.findall(r"`(bench/results/[^`]*-evaluation-tables\.json)`", page)
    assert len(set(named)) == 1
    printed = "\n".join(json.loads((ROOT / named[0]).read_text())["output"].values())
    tables = re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(tables) >= 3
    lines = set(printed.splitlines())
    for table in tables:
        assert [line for line in table.splitlines() if line not in lines] == []


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that would have been run."""
    begun: list[list[str]] = []

    def run(words, **_):
        begun.extend([words[3:]] if "fastgessl" in words else [])
        return SimpleNamespace(stdout="epoch 1 of 12, 3 s\nFrozen features, digits\n 1 2  \nrun folder: x\n")

    monkeypatch.setattr(evaluation_tables.subprocess, "run", run)
    return begun


def test_the_page_names_the_commands_that_are_run(commands, tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    np.savez(tmp_path / "further.npz", train_x=np.zeros((2, 4, 4, 1), np.uint8))
    evaluation_tables.main(
        ["--few-shot", str(tmp_path / "further.npz"), "--work", str(tmp_path), "--out", str(tmp_path)]
    )

    assert [words[0] for words in commands] == ["train", "train", "evaluate", "evaluate"]
    assert " ".join(commands[1][4:]) in page and " ".join(commands[2][2:]) in page
    config = load(evaluation_tables.RECIPE).config
    for _, _, *options in commands:
        override(
            config,
            [
                {"--tasks": "--evaluate.tasks", "--transfer": "--evaluate.transfer"}.get(word, word)
                for word in options
            ],
            "test",
        )


def test_what_stands_around_the_tables_is_left_out(commands, tmp_path):
    evaluation_tables.main(["--work", str(tmp_path), "--out", str(tmp_path)])

    (written,) = tmp_path.rglob("*.json")
    assert len(commands) == 3
    assert set(json.loads(written.read_text())["output"].values()) == {"Frozen features, digits\n 1 2"}


def test_a_command_that_fails_is_not_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_tables, "RECIPE", "no-such-recipe")
    with pytest.raises(evaluation_tables.subprocess.CalledProcessError):
        evaluation_tables.main(["--work", str(tmp_path), "--out", str(tmp_path)])
