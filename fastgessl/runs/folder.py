"""Names, writes and reads the files of a run's folder.

config.yaml            the complete configuration; `fastgessl train config.yaml` repeats the run
environment.json       versions, device, processes, and the numbers that were derived (learning rate, batch
                       sizes, engine); environment-step-<n>.json: the same of a continuation, and which
                       options changed
metrics.jsonl          one line per logged step, the same to the last digit in two runs with one seed on one
                       machine
timing.jsonl           images/s and seconds of the same steps, which never repeat
checkpoints/           step-<n>/, the newest k, each complete or absent
encoder.safetensors    the backbone's weights, by timm's names
evaluation.json        every measured number;  summary.json  the outcome on one page
"""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError

from fastgessl.config import Config, UsageError
from fastgessl.recipes.compose import describe
from fastgessl.recipes.yaml_file import read_yaml

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
    """The folder that the configuration names, or a fresh `runs/<recipe>-<time>`. UsageError if something is
    in the way.
    """
    folder, resume = config.train.run_dir, config.train.resume
    if folder is None:
        if resume in ("auto", "if_any"):
            raise UsageError(
                f"--train.resume {resume} needs --train.run_dir, the folder of the run to continue. None was "
                "given."
            )
        # A recipe file may come from anyone: nothing in its name leads a path elsewhere.
        recipe = re.sub(r"[^\w.+-]+", "_", config.recipe).lstrip(".")[:100] or "run"
        fresh = Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        # Two runs may start within one second.
        further = (fresh.with_name(f"{fresh.name}-{count}") for count in itertools.count(2))
        return next(path for path in itertools.chain([fresh], further) if not path.exists())
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"train.run_dir '{folder}' is a file. Name a folder.")
    with writing(folder):
        occupied = folder.is_dir() and any(path.suffix != ".part" for path in folder.iterdir())
    ours = (folder / "config.yaml").is_file()
    if occupied and (resume == "never" or (resume != "auto" and not ours)):
        advice = (
            "Continue that run with --train.resume auto, or name another folder."
            if ours
            else "It is no run's. Name another folder."
        )
        raise UsageError(
            f"train.run_dir '{folder}' is not empty, and nothing in it will be overwritten. {advice}"
        )
    return folder


def create(folder: Path, config: Config, facts: Mapping[str, Any], continued: str = "") -> None:
    """Make the folder and write config.yaml, which repeats the run in another one, and environment.json.

    `continued` names the checkpoint from which a run of this folder continues: config.yaml then has the
    options that it continues with, and the environment is environment-<continued>.json. UsageError if that
    fails.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    values = _repeatable(config).model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    write_bytes(folder / "config.yaml", text.encode())
    name = f"environment-{continued}.json" if continued else "environment.json"
    write_json(folder / name, environment() | dict(facts))


def changes(earlier: Config, config: Config) -> list[str]:
    """`section.option: before -> now` for each option that a continuation changes."""
    before, now = _repeatable(earlier).options(), _repeatable(config).options()
    return [f"{name}: {before[name]} -> {value}" for name, value in now.items() if value != before[name]]


def _repeatable(config: Config) -> Config:
    train = config.train.model_copy(update={"run_dir": None, "resume": "never"})
    return config.model_copy(update={"train": train})


def continuation(folder: Path, before: Path | None = None) -> str:
    """The command that continues a run, or starts one from its checkpoint `before` in a new folder. Safe to
    paste into a shell whatever the folder is called.
    """
    words = ["fastgessl", "train", folder / "config.yaml"]
    if before is None:
        words += ["--train.run_dir", folder, "--train.resume", "auto"]
    else:
        words += ["--train.resume", before]
    return shlex.join(str(word) for word in words)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a full, read-only or vanished disk becomes a UsageError of one line that names `path`; other
    errors pass.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its own, in whose context the system's error
        # stands.
        refused = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refused, OSError):
            raise
        raise UsageError(
            f"'{path}' cannot be written ({refused.strerror or refused}). What was complete before is "
            "untouched. Make room or mend "
            "the permissions and continue with --train.resume auto, or name another folder with "
            "--train.run_dir."
        ) from None


def read_config(folder: str | Path) -> Config:
    """The configuration of a run. UsageError if the folder is no run."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UsageError(
            f"'{folder}' is not the folder of a run: it holds no config.yaml. `fastgessl train` prints the "
            "folder it wrote."
        )
    try:
        return Config.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UsageError(f"'{path}' is not a configuration of this version: {describe(error)}") from None


def environment() -> dict[str, Any]:
    """Versions and machine, as environment.json and `fastgessl doctor` show them. Imports nothing heavy but
    torch.
    """
    import torch

    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
    }


def version_of(package: str) -> str:
    """The version of an installed package; empty if it is absent.

    >>> version_of("no such package")
    ''
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write by renaming, so that a reader or a crash never sees half a file. UsageError if it cannot be
    written.
    """
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for any content, flushed to the disk before the name changes."""
    temporary = path.with_name(path.name + ".part")
    with writing(path):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class JsonLines:
    """An append-only file of one JSON object a line; lines from `first_step` on are dropped first, so that a
    resumed run repeats none.

    With `enabled` false, as on all ranks but the first, it touches nothing. UsageError if it cannot be
    written.
    """

    def __init__(self, path: Path, first_step: int, *, enabled: bool = True) -> None:
        self._path = path
        self._file: IO[str] | None = None
        if not enabled:
            return
        kept = [line for line in _lines(path) if _step_of(line) < first_step]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object; a number that is not finite becomes null, since JSON has none."""
        if self._file is not None:
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()
            }
            with writing(self._path):
                self._file.write(json.dumps(finite, allow_nan=False) + "\n")
                self._file.flush()

    def close(self) -> None:
        # What a full disk has refused is still in the buffer, and closing would try it again.
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a line; infinite for the half line of a run that was killed while writing it."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
