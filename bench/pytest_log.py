"""A plugin, `pytest -p bench.pytest_log --outcomes FILE`: a line of JSON for each test once it has ended, so
that a cut run tells all.

Tests that stand alone run before those with many cases: they say most in the least time. The first line holds
the names of all. A process whose device answers no more ends after the test that did it, and pytest-xdist
puts a new one in its place: its other tests would fail at once, and because that is fast, it would be given
most of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

LONGEST_TRACEBACK = 6000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", required=True, help="file for the outcomes, one line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    # The processes of pytest-xdist report to the first one.
    one_of_several = hasattr(config, "workerinput")
    config.pluginmanager.register(_Device(one_of_several))
    if not one_of_several:
        config.pluginmanager.register(_Log(Path(config.getoption("--outcomes"))))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = Counter(_function(item.nodeid) for item in items)
    items.sort(key=lambda item: cases[_function(item.nodeid)])


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


class _Device:
    def __init__(self, one_of_several: bool) -> None:
        self.one_of_several = one_of_several
        self.lost = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Not where the reports of other processes arrive.
        if report.failed and (self.one_of_several or not hasattr(report, "node")):
            self.lost = self.lost or _device_lost()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.lost and self.one_of_several:
            os._exit(1)

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.lost and not self.one_of_several:
            item.session.shouldfail = "the device answers no more"


def _device_lost() -> bool:
    if "torch" not in sys.modules:
        return False
    from bench.attempts import device_error

    return device_error() is not None


class _Log:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        path.write_text("")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._collected(list(ids))

    def _collected(self, names: list[str]) -> None:
        if not self.names:
            self.names = names
            self._write({"collected": names})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"begun": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when in ("setup", "teardown") and report.passed:
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
            "measured": dict(report.user_properties),
        }
        self._write(line | {"said": report.longreprtext[-LONGEST_TRACEBACK:]})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def summary(path: Path) -> dict[str, Any]:
    """How many tests passed, failed, were skipped, were cut before their end or not reached, by name too, and
    what the failed ones said.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    collected = [name for line in lines for name in line.get("collected", [])]
    ended: dict[str, str] = {}
    said: dict[str, str] = {}
    for line in (line for line in lines if "test" in line):
        name = line["test"]
        ended[name] = "failed" if "failed" in (ended.get(name), line["outcome"]) else line["outcome"]
        if line["outcome"] != "passed":
            said[name] = "\n".join(filter(None, (said.get(name), line["said"])))
    begun = {line["begun"] for line in lines if "begun" in line}
    outcomes = ended | {
        name: "cut" if name in begun else "not reached" for name in collected if name not in ended
    }
    counts = Counter(outcomes.values())
    return {
        **{
            outcome.replace(" ", "_"): counts[outcome]
            for outcome in ("passed", "failed", "skipped", "cut", "not reached")
        },
        "said": said,
        "measured": {line["test"]: line["measured"] for line in lines if line.get("measured")},
        "outcomes": outcomes,
    }
