"""What a run's folder says: configuration, metrics step by step, evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgessl.config import Config, UsageError
from fastgessl.runs import read_config

Series = tuple[list[float], list[float]]
"""Steps and values."""


@dataclass(frozen=True)
class Record:
    """A run, read."""

    folder: Path
    config: Config
    metrics: tuple[dict[str, Any], ...]
    timing: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any]
    """As evaluation.json; empty if the run has not been trained to its end."""
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, which is how a person knows the run."""
        return self.folder.resolve().name

    def series(self, name: str) -> Series:
        """A logged number by step, where it was measured and finite; images_per_second is in timing.jsonl."""
        steps, values = [], []
        for line in self.timing if name == "images_per_second" else self.metrics:
            value = line.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                steps.append(float(line["step"]))
                values.append(float(value))
        return steps, values

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 if none was."""
        return max((line["step"] for line in self.metrics), default=0)


def read_record(folder: Path) -> Record:
    """A run from its folder. UsageError if it is no run, or holds no metrics and no evaluation."""
    config = read_config(folder)
    metrics, timing = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
    evaluation, environment = (_object(folder / f"{name}.json") for name in ("evaluation", "environment"))
    if not metrics and not evaluation:
        raise UsageError(
            f"run '{folder}' has no metrics.jsonl and no evaluation.json, so there is nothing to report. "
            "Train it first."
        )
    return Record(folder, config, metrics, timing, evaluation, environment)


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a .jsonl file; the half line that a killed run leaves at its end is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return tuple(found)


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{path}' is damaged ({error}). Measure the run again: fastgessl evaluate {path.parent}"
        ) from None
    return values if isinstance(values, dict) else {}
