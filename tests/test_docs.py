"""Every example runs and every command parses: doctests of all modules, code and commands of README and docs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import fastgessl as package

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench").glob("*.md"))]
MODULES = [module.name for module in pkgutil.walk_packages(package.__path__, "fastgessl.") if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), scope)


def _commands() -> list[str]:
    """`fastgessl train ...` and its equals in the pages' shell blocks."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            joined = block.replace("\\\n", " ")
            found += re.findall(r"(?:fastgessl|-m fastgessl) (train [^\n#]+)", joined)
    return sorted(set(found))


@pytest.mark.parametrize("command", _commands())
def test_a_training_command_of_the_pages_parses(command, fastgessl):
    words = shlex.split(command)
    if words[1].endswith(".yaml"):
        pytest.skip("names a file of the reader's")
    assert fastgessl(*words, "--print_config").code == 0


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_results_file_that_is_named_exists():
    for page in PAGES:
        for target in re.findall(r"bench/results/[\w./-]+\.json", page.read_text()):
            assert (ROOT / target).is_file(), f"{page.name}: {target}"
