"""Every example runs and every command parses: docstrings, README and docs."""

import argparse
import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import fastgessl as package
from fastgessl.cli import COMMANDS
from fastgessl.config import Config
from fastgessl.pipelines.prepare import Prepared

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench").glob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(package.__path__, "fastgessl.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    outcome = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), scope)


def _shell_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, and the pieces of code within its sentences."""
    blocks, inside, language = [], False, ""
    text: list[str] = []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, language = not inside, line.removeprefix("```").strip()
        elif not inside:
            text.append(line)
        elif language in ("", "sh", "bash", "console"):
            blocks.append(line)
    commands = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return commands + [piece for piece in re.findall(r"`([^`]+)`", "\n".join(text)) if "\n" not in piece]


def _commands(pattern: str) -> list[str]:
    """What `pattern` finds behind the program's name, for a page's own commands: not for forms such as
    `RECIPE [--option …]`.
    """
    lines = [line for page in PAGES for line in _shell_lines(page) if not re.search(r"[…\[\]]|RECIPE", line)]
    return sorted({found.strip() for line in lines for found in re.findall(pattern, line)})


@pytest.fixture
def idle(monkeypatch) -> list[str]:
    """What commands begin once their options are understood is left undone; the names of what was begun."""
    begun: list[str] = []
    results = {
        "evaluate.subject.base_config": Config(),
        "evaluate.subject.open_subject": None,
        "evaluate.run.evaluate_subject": None,
        "commands.embed.base_config": Config(),
        "commands.embed.open_subject": None,
        "commands.embed.embed": 0,
        "report.write_report": "report.html",
        "commands.export.export_run": "export",
        "commands.prepare.prepare_folder": Prepared(),
        "commands.prepare.fetch": None,
        "commands.views.write_view_grid": "views.png",
        "commands.doctor.findings": [],
    }
    for name, result in results.items():
        monkeypatch.setattr(
            f"fastgessl.{name}", lambda *_, name=name, result=result, **__: begun.append(name) or result
        )
    return begun


@pytest.mark.parametrize("command", _commands(rf"(?:^|\s)fastgessl ((?:{'|'.join(COMMANDS)})(?: [^#]+)?)"))
def test_a_command_of_the_pages_parses(command, fastgessl, idle):
    words = shlex.split(command)
    if len(words) == 1 and words[0] not in ("recipes", "doctor"):
        pytest.skip("a command's name within a sentence")
    if any(word.endswith(".yaml") for word in words) or any("simsiam" in word for word in words):
        pytest.skip("names what the reader writes")
    train = words[0] == "train" and "--help" not in words

    outcome = fastgessl(*words, *(["--print_config"] if train else []))

    assert outcome.code == 0, outcome.err
    assert idle or words[0] in ("train", "recipes")


@pytest.mark.parametrize("command", _commands(r"python -m (bench[.\w]*(?: [^#]+)?)"))
def test_a_benchmark_of_the_pages_takes_its_options(command, monkeypatch):
    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def understood(parser, *arguments):
        parse(parser, *arguments)
        raise Understood

    module, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, *options])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understood)
    with pytest.raises(Understood):
        runpy.run_module(module if "." in module else f"{module}.__main__", run_name="__main__")


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_results_file_that_is_named_exists():
    written = {path.name for path in (ROOT / "bench" / "results").rglob("*.json")}
    for page in PAGES:
        for target in re.findall(r"bench/results/[\w./-]+\.json", page.read_text()):
            assert (ROOT / target).is_file(), f"{page.name}: {target}"
        for name in re.findall(r"\d{4}-\d\d-\d\d-[\w-]+\.json", page.read_text()):
            assert name in written, f"{page.name}: {name}"
