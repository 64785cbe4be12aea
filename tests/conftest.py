"""The command in this process, and a run that is trained once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from finished_run import Outcome, in_this_process, train_tiny


@pytest.fixture
def fastgessl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `fastgessl ARGUMENTS` in this process."""
    return lambda *arguments: in_this_process(arguments, capsys.readouterr)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A finished run, shared: copy it before writing into it."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run")
