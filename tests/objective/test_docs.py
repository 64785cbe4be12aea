import doctest
import importlib
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "gessl.md"


def test_the_examples_in_docs_gessl_md_run():
    results = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert results.attempted > 20 and results.failed == 0


@pytest.mark.parametrize("module", ["bilevel", "differentiable", "gessl", "inner", "noise", "sigma", "task"])
def test_the_examples_in_the_docstrings_of_objective_run(module):
    assert doctest.testmod(importlib.import_module(f"fastgessl.objective.{module}")).failed == 0
