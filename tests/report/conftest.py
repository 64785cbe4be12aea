from pathlib import Path

import pytest
from finished_run import train_tiny


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one experiment."""
    folder = tmp_path_factory.mktemp("two")
    return [train_tiny(folder / f"seed-{seed}", "--train.seed", str(seed)) for seed in (0, 1)]
