"""The smallest run that is still a run, and how to read what it wrote."""

import json
from pathlib import Path
from typing import Any

# Eight-pixel views and a ResNet-18 of an eighth of its width: a step takes milliseconds.
TINY = (
    "--views.size",
    "8",
    "--model.width",
    "0.125",
    "--train.batch_size",
    "64",
    "--train.max_steps",
    "4",
    "--evaluate.tasks",
    "knn",
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
