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
        lines = self.timing if name == "images_per_second" else self.metrics
        found = [
            (line["step"], line[name])
            for line in lines
            if isinstance(line.get(name), int | float) and math.isfinite(line[name])
        ]
        return [float(step) for step, _ in found], [float(value) for _, value in found]

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 if none was."""
        return max((line["step"] for line in self.metrics), default=0)


def read_record(folder: Path) -> Record:
    """A run from its folder. UsageError if it is no run, or holds no metrics and no evaluation."""
    config = read_config(folder)
    metrics, timing = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
    record = Record(
        folder,
        config,
        metrics,
        timing,
        _object(folder / "evaluation.json"),
        _object(folder / "environment.json"),
    )
    if not record.metrics and not record.evaluation:
        raise UsageError(
            f"run '{folder}' has no metrics.jsonl and no evaluation.json, so there is nothing to report. "
            "Train it first."
        )
    return record


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a .jsonl file; the half line that a killed run leaves at its end is passed over."""
    if not path.is_file():
        return ()
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
