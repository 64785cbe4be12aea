"""A run's folder: what it holds, who may write there, and how it is read again.

config.yaml            the complete configuration; `fastgessl train config.yaml` repeats the run
environment.json       versions, device, processes, and the numbers that were derived (learning rate, batch sizes, engine)
metrics.jsonl          one line a logged step, the same to the last digit in two runs with one seed on one machine
timing.jsonl           images/s and seconds of the same steps, which never repeat
checkpoints/           step-<n>/, the newest k, each complete or absent
encoder.safetensors    the backbone's weights, by timm's names
evaluation.json        every measured number;  summary.json  the outcome on one page
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError

from fastgessl.config import Config, UsageError

PACKAGES = (
    "fastgessl",
    "torch",
    "triton",
    "torchvision",
    "timm",
    "accelerate",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
    "scikit-learn",
)


def run_folder(config: Config) -> Path:
    """The folder that the configuration names, or a fresh `runs/<recipe>-<time>`. UsageError if something is in the way."""
    folder = config.train.run_dir
    if folder is None:
        if config.train.resume == "auto":
            raise UsageError("--train.resume auto needs --train.run_dir, the folder of the run to continue. None was given.")
        return _unused(Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"train.run_dir '{folder}' is a file. Name a folder.")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and config.train.resume == "never":
        raise UsageError(
            f"train.run_dir '{folder}' is not empty, and nothing in it will be overwritten. "
            "Continue that run with --train.resume auto, or name another folder."
        )
    return folder


def _unused(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3 ... if two runs start within one second."""
    candidate, count = folder, 1
    while candidate.exists():
        count += 1
        candidate = folder.with_name(f"{folder.name}-{count}")
    return candidate


def create(folder: Path, config: Config, facts: Mapping[str, Any]) -> None:
    """Make the folder and write config.yaml and environment.json. UsageError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))
        write_json(folder / "environment.json", environment() | dict(facts))
    except OSError as error:
        raise UsageError(f"the run's folder '{folder}' cannot be written ({error.strerror}). Name another with --train.run_dir.") from None


def read_config(folder: str | Path) -> Config:
    """The configuration of a run. UsageError if the folder is no run."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"'{folder}' is not the folder of a run: it holds no config.yaml. `fastgessl train` prints the folder it wrote.")
    try:
        return Config.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise UsageError(f"'{path}' is not a configuration of this version: {' '.join(str(error).split())}") from None


def environment() -> dict[str, Any]:
    """Versions and machine, as environment.json and `fastgessl doctor` show them. Imports nothing heavy but torch."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write by renaming, so that a reader or a crash never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")
    os.replace(temporary, path)


class JsonLines:
    """An append-only file of one JSON object a line; lines from `first_step` on are dropped first, so that a resumed run repeats none.

    With `enabled` false, as on all ranks but the first, it touches nothing.
    """

    def __init__(self, path: Path, first_step: int, *, enabled: bool = True) -> None:
        self._file: IO[str] | None = None
        if not enabled:
            return
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    values = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the half line of a run that was killed while writing it
                if values["step"] < first_step:
                    kept.append(line)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
