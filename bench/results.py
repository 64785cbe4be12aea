"""Write measurements to `bench/results/<machine>/<date>-<name>.json`, with all that is needed to believe or
repeat them.
"""

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgessl.runs import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMMIT = "FASTGESSL_COMMIT"
"""The environment variable that names the commit of a tree without .git, or on a machine without git."""
FACTS = ("started", "python", "cpu_cores", "gpus", "cuda", "versions")


def machine() -> str:
    """The first GPU's name as a folder name, or `cpu-2-core` and the like."""
    if not torch.cuda.is_available():
        return f"cpu-{os.cpu_count()}-core"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of a program that writes results; `doc` begins with what it does."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    return found


def place(name: str, out: Path | None = None) -> Path:
    """Today's `name` in this machine's folder, which is made. `out` replaces the folder bench/results."""
    folder = (out or RESULTS) / machine()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{time.strftime('%Y-%m-%d')}-{name}"


def write(name: str, measured: Mapping[str, Any], out: Path | None = None) -> Path:
    """Store a measurement with versions, processor and commit; returns the file. A process that is killed
    leaves the file as it was.
    """
    path = place(f"{name}.json", out)
    facts = environment()
    record = {
        "name": name,
        "commit": commit(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        **{key: facts[key] for key in FACTS},
        **measured,
    }
    return replaced(path, json.dumps(record, indent=1) + "\n")


def replaced(path: Path, text: str) -> Path:
    """Write a file: readers see the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    return unfinished.replace(path)


def commit() -> str:
    """The commit of the working tree, `-dirty` if its code is not that commit's. Results and pages that a run
    has just written do not count.

    Without git or .git, what the environment variable FASTGESSL_COMMIT says, else `unknown`.
    """
    code = (".", ":(exclude)bench/results", ":(exclude)docs")
    known = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{known}-dirty" if changed else known or os.environ.get(COMMIT) or "unknown"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git itself is not there
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else "unknown"
