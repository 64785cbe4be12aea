"""Checkpoints that are complete or absent, and resume to the bit.

A checkpoint is a folder `checkpoints/step-<n>` with `state.pt`: everything that the next step depends on. It is written under a
temporary name, flushed to disk and renamed, so a kill at any moment leaves the older ones untouched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastgessl.config import UsageError

FORMAT = 1
_PREFIX = "step-"


def save(run: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint before optimiser step `step`, and delete all but the newest `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob("*.part"):
        shutil.rmtree(torn)
    target = folder / f"{_PREFIX}{step:09d}"
    if not target.exists():
        partial = target.with_name(target.name + ".part")
        partial.mkdir()
        with (partial / "state.pt").open("wb") as file:
            torch.save({"format": FORMAT, "step": step} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _flush_folder(folder)
    for old in complete(run)[:-keep]:
        shutil.rmtree(old)
    return target


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob(f"{_PREFIX}*") if path.suffix != ".part" and (path / "state.pt").is_file())


def find(run: Path, resume: str) -> Path | None:
    """What --train.resume means: None for never, the newest of `run` for auto, else the named folder. UsageError if there is none."""
    if resume == "never":
        return None
    if resume == "auto":
        found = complete(run)
        if not found:
            raise UsageError(
                f"--train.resume auto found no checkpoint in '{run / 'checkpoints'}'. Start the run with --train.resume never."
            )
        return found[-1]
    if not (Path(resume) / "state.pt").is_file():
        raise UsageError(
            f"--train.resume '{resume}' is not a checkpoint (it holds no state.pt). Give never, auto, or a folder checkpoints/step-<n>."
        )
    return Path(resume)


def load(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold. UsageError if it is damaged or from a newer version."""
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"checkpoint '{checkpoint}' cannot be read ({type(error).__name__}); it is damaged or not ours. "
            "Resume from an older one by giving its folder."
        ) from error
    if state.get("format") != FORMAT:
        raise UsageError(
            f"checkpoint '{checkpoint}' has format {state.get('format')}, this version reads {FORMAT}. Use the version that wrote it."
        )
    return state
