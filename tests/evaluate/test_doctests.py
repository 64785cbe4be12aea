from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["features", "geometry", "knn", "linear", "online", "progress", "sigma", "splits", "suite"])
def test_the_examples_in_the_docstrings_run(name):
    outcome = doctest.testmod(importlib.import_module(f"fastgessl.evaluate.{name}"))

    assert outcome.failed == 0 and outcome.attempted > 0
