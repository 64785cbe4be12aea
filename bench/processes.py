"""Programs that are run to their end or to a limit, and then end with everything that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
LAST_WORDS = 5.0
"""Seconds between SIGTERM and SIGKILL: torchrun ends its ranks, which are in sessions of their own, on the
first only."""


@dataclass(frozen=True)
class Ended:
    exit_code: int | None
    """None: it was cut."""
    out: str = ""
    err: str = ""


def run(
    command: Sequence[str],
    seconds: float,
    *,
    capture: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run `command` in the repository for at most `seconds`; whatever of its process group is left then, or
    when it ends, is ended too.

    `environment` adds to this process's. What is captured goes through files: a pipe would be held open by a
    process that got away.

    >>> run(["echo", "a"], 60).out
    'a\\n'
    >>> run(["sleep", "60"], 0.1).exit_code is None
    True
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (out, err) if capture else (None, None)
        surroundings = os.environ | dict(environment or {})
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdout=streams[0], stderr=streams[1], start_new_session=True
        )
        exit_code = None
        try:
            exit_code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        return Ended(exit_code, _read(out), _read(err))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Returns within twice LAST_WORDS, also where the device's driver does not let go of a process."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + LAST_WORDS
        _signal(process, number)
        while _signal(process, 0) and time.monotonic() < until:
            time.sleep(0.05)


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Whether anything of the group was there to get it; 0 is a question only."""
    process.poll()
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
