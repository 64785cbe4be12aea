"""Ranks as forks of this process: they start in milliseconds, for what needs no autograd."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return probe.getsockname()[1]


def forked(
    ranks: int, work: Callable[[int], None], folder: Path, *, seconds: float = 60.0
) -> list[tuple[int, str]]:
    """(exit code, standard error) of `work(rank)` on each rank, under the environment that a launcher sets;
    -9 as subprocess counts.
    """
    port = free_port()
    processes = [_fork(rank, ranks, port, work, folder / f"{rank}.log") for rank in range(ranks)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < ranks:
        if time.monotonic() > deadline:
            for process in set(processes) - set(codes):
                os.kill(process, 9)
            raise AssertionError(
                f"still running after {seconds:.0f} s: ranks "
                f"{[processes.index(p) for p in set(processes) - set(codes)]}"
            )
        for process in set(processes) - set(codes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [(codes[process], (folder / f"{rank}.log").read_text()) for rank, process in enumerate(processes)]


def _fork(rank: int, ranks: int, port: int, work: Callable[[int], None], log: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_PORT": str(port),
        }
        os.environ |= {"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true"}
        work(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
