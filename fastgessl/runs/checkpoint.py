"""Checkpoints that are complete or absent, and resume to the bit.

A checkpoint is a folder `checkpoints/step-<n>` with `state.pt`: everything that the next step depends on. It
is written under a temporary name, flushed to disk and renamed, so a kill at any moment leaves the older ones
untouched.
"""

from __future__ import annotations

import itertools
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgessl.config import UsageError
from fastgessl.runs.folder import writing

FORMAT = 2
_PREFIX = "step-"
# Of a run that goes on from an earlier step: what tells how it came to the later ones, and what came of them.
_COPIED = ("config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl")
_RESULTS = ("encoder.safetensors", "evaluation.json", "summary.json")
# Types of what every checkpoint of this format holds; a file without them is not ours, whatever it says.
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "skipped": int,
    "symptoms": dict,
    "objective": dict,
    "optimizer": dict,
    "scaler": (dict, type(None)),
    "loader": dict,
    "probe": (dict, type(None)),
    "ranks": list,
}


def save(run: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint before optimiser step `step`, and delete all but it and the newest
    `keep - 1` others.

    One of the same step is replaced. Raises UsageError if the disk is full or cannot be written; what was
    there is then as it was.
    """
    folder = run / "checkpoints"
    target = folder / f"{_PREFIX}{step:09d}"
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob("*.part"):
            shutil.rmtree(torn)
        _write(target, {"format": FORMAT, "step": step} | state)
        # Only now: until the new one is complete, no older one is given up.
        others = [path for path in complete(run) if path != target]
        for old in others[: max(len(others) - keep + 1, 0)]:
            shutil.rmtree(old)
    return target


def _write(target: Path, state: dict[str, Any]) -> None:
    partial = target.with_name(target.name + ".part")
    partial.mkdir()
    try:
        with (partial / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _flush_folder(partial)
        if target.exists():
            # No folder can be renamed to one that holds something, but a file to another: at every moment one
            # of the two is there.
            os.replace(partial / "state.pt", target / "state.pt")
            partial.rmdir()
            _flush_folder(target)
        else:
            os.replace(partial, target)
    except (OSError, RuntimeError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob(f"{_PREFIX}*") if path.suffix != ".part" and (path / "state.pt").is_file())


def find(run: Path, resume: str) -> Path | None:
    """What --train.resume means: None for never, the newest of `run` for auto and if_any, else the named
    folder.

    UsageError if there is none, except for if_any, which then gives None.
    """
    if resume == "never":
        return None
    if resume in ("auto", "if_any"):
        found = complete(run)
        if not found and resume == "auto":
            raise UsageError(
                f"--train.resume auto found no checkpoint in '{run / 'checkpoints'}'. Start the run with "
                "--train.resume never, or if_any."
            )
        return found[-1] if found else None
    if not (Path(resume) / "state.pt").is_file():
        raise UsageError(
            f"--train.resume '{resume}' is not a checkpoint (it holds no state.pt). "
            "Give never, auto, if_any, or a folder checkpoints/step-<n>."
        )
    return Path(resume)


def set_aside(run: Path, resumed: Path, step: int) -> Path | None:
    """Before `run` goes on from `resumed`, the checkpoint before `step`: move what it did after that into
    `run/branch-<n>`; returns it.

    Otherwise the later checkpoints would count as the newest. The branch is a run's folder itself, with
    configuration, logs and results, and can be continued. None if there is nothing later. Raises UsageError
    if the disk refuses.
    """
    own = resumed.resolve()
    later = [path for path in complete(run) if _step_of(path) >= step and path.resolve() != own]
    if not later:
        return None
    branch = next(folder for number in itertools.count(1) if not (folder := run / f"branch-{number}").exists())
    with writing(branch):
        (branch / "checkpoints").mkdir(parents=True)
        for name in _COPIED:
            if (run / name).is_file():
                shutil.copyfile(run / name, branch / name)
        for path in [run / name for name in _RESULTS if (run / name).is_file()]:
            os.replace(path, branch / path.name)
        # The newest last: a kill in between leaves one to be found, and the next start moves the rest.
        for path in later:
            os.replace(path, branch / "checkpoints" / path.name)
        _flush_folder(branch / "checkpoints")
        _flush_folder(run / "checkpoints")
    return branch


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else -1


def load(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold. UsageError if it is damaged, not ours, or
    from a newer version.
    """
    file = checkpoint / "state.pt"
    try:
        _refuse_compressed(file)
        # Mapped, so that a rank reads the parts it keeps and 8 ranks of a machine share the pages.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(
            f"checkpoint '{checkpoint}' cannot be read ({type(error).__name__}); it is damaged or not ours. "
            "Resume from an older one by giving its folder."
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT:
        shown = found if type(found) is int else "none"
        raise UsageError(f"checkpoint '{checkpoint}' has format {shown}, this version reads {FORMAT}. Use "
                         "the version that wrote it.")
    wrong = [name for name, kind in _CONTENT.items() if name not in state or not isinstance(state[name], kind)]
    if wrong:
        raise UsageError(
            f"checkpoint '{checkpoint}' lacks {', '.join(wrong)}, so it is not one of ours. Resume from "
            "another by its folder."
        )
    return state


def _refuse_compressed(file: Path) -> None:
    """torch never compresses; a file that does could swell to any size in memory. ValueError for one."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError(f"{file} is compressed")
