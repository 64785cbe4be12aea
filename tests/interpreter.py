"""Programs that run the Triton kernels in Triton's interpreter, each in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def skip_without_interpreter():
    """Skip the test where Triton is not installed or cannot interpret."""
    pytest.importorskip("triton")
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")


def interpreted(*words, given=None, **environment):
    """The finished process of `python WORDS`, which gets `given` on its standard input."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    own = {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    surroundings = os.environ | own | environment
    return subprocess.run(command, env=surroundings, input=given, capture_output=True, text=True)


def printed_by(program, cases=None):
    """What `programs/PROGRAM` prints as JSON for these cases."""
    skip_without_interpreter()
    found = interpreted(TESTS / "programs" / program, given=json.dumps(cases))
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)
