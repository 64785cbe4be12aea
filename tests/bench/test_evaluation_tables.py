"""docs/evaluation.md shows tables that were printed, and where from."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bench.studies import evaluation_tables
from fastgessl.recipes import load, override

ROOT = Path(__file__).resolve().parents[2]


def test_every_table_of_the_page_stands_in_the_file_that_it_names():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (named,) = set(re.findall(r"`(bench/results/[^`]*-evaluation-tables\.json)`", page))
    printed = "\n".join(json.loads((ROOT / named).read_text())["output"].values())
    tables = re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(tables) >= 3
    assert {line for table in tables for line in table.splitlines()} <= set(printed.splitlines())


def test_the_page_names_the_commands_that_are_run_and_tables_alone_are_kept(monkeypatch, tmp_path):
    commands = []

    def run(words, **_):
        commands.extend([words[3:]] if "fastgessl" in words else [])
        return SimpleNamespace(stdout="epoch 1 of 12, 3 s\nFrozen features, digits\n 1 2  \nrun folder: x\n")

    monkeypatch.setattr(evaluation_tables.subprocess, "run", run)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    np.savez(tmp_path / "further.npz", train_x=np.zeros((2, 4, 4, 1), np.uint8))
    evaluation_tables.main(
        ["--few-shot", str(tmp_path / "further.npz"), "--work", str(tmp_path), "--out", str(tmp_path)]
    )

    assert [words[0] for words in commands] == ["train", "train", "evaluate", "evaluate"]
    assert " ".join(commands[1][4:]) in page and " ".join(commands[2][2:]) in page
    config = load(evaluation_tables.RECIPE).config
    sections = {"--tasks": "--evaluate.tasks", "--transfer": "--evaluate.transfer"}
    for _, _, *options in commands:
        override(config, [sections.get(word, word) for word in options], "test")
    (written,) = tmp_path.rglob("*.json")
    assert set(json.loads(written.read_text())["output"].values()) == {"Frozen features, digits\n 1 2"}
