"""Checkpoints that are complete or absent, and resume to the bit.

A checkpoint is a folder `checkpoints/step-<n>` with `state.pt`: everything that the next step depends on. It
is written under a temporary name, flushed to disk and renamed, so a kill at any moment leaves the older ones
untouched.
"""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgessl.config import UsageError
from fastgessl.runs.folder import writing

FORMAT = 3
_PREFIX = "step-"
# Types of what every checkpoint of this format holds; a file without them is not ours, whatever it says.
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "skipped": int,
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
    target = folder_of(run, step)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for torn in target.parent.glob("*.part"):
            shutil.rmtree(torn)
        _write(target, {"format": FORMAT, "step": step} | state)
        # Only now: until the new one is complete, no older one is given up.
        others = [path for path in complete(run) if path != target]
        for old in others[: max(len(others) - keep + 1, 0)]:
            shutil.rmtree(old)
    return target


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint before optimizer step `step` is, or would be."""
    return run / "checkpoints" / f"{_PREFIX}{step:09d}"


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
    """Make the names in a folder durable. Windows opens no folder, and keeps names durable by itself."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(
        path
        for path in (run / "checkpoints").glob(f"{_PREFIX}*")
        if path.suffix != ".part" and (path / "state.pt").is_file()
    )


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint that --train.resume names: the newest of `run` for auto and if_any, else a folder.

    UsageError if there is none, except for if_any, which then gives None; and if `run` has a newer one than
    the named: a run is never written backwards.
    """
    found = complete(run)
    newest = found[-1] if found else None
    if resume == "auto" and newest is None:
        raise UsageError(
            f"--train.resume auto found no checkpoint in '{run / 'checkpoints'}'. Start the run with "
            "--train.resume never, or if_any."
        )
    if resume in ("auto", "if_any"):
        return newest
    named = Path(resume)
    if not (named / "state.pt").is_file():
        raise UsageError(
            f"--train.resume '{resume}' is not a checkpoint (it holds no state.pt). "
            "Give never, auto, if_any, or a folder checkpoints/step-<n>."
        )
    if (run / "config.yaml").is_file() and (newest is None or newest.resolve() != named.resolve()):
        raise UsageError(
            f"train.run_dir '{run}' is not at '{resume}', and a run is never written backwards. Continue "
            "from there in another --train.run_dir, or this run with --train.resume auto."
        )
    return named


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
        raise UsageError(
            f"checkpoint '{checkpoint}' has format {shown}, this version reads {FORMAT}. Use the version "
            "that wrote it."
        )
    wrong = [
        name for name, kind in _CONTENT.items() if name not in state or not isinstance(state[name], kind)
    ]
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
