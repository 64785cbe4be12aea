"""The store through which the processes of a job find one another, with a part of its own for every time they
are started.

torchrun keeps one store over all its restarts, and the addresses in it of processes that are gone. gloo and
NCCL take them for those of their peers: "Connection refused", or both ends wait for minutes to be called (two
of ten restarts with torch 2.15; pytorch issue 135712).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed import PrefixStore, Store, TCPStore, register_rendezvous_handler

_SCHEME = "fastgessl"


def open_store(rank: int, seconds: float) -> TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT. Rank 0 serves it, for as long as it keeps what this returns,
    unless torchrun's agent does.

    RuntimeError if it is not reached within so many seconds, or if the port is taken.
    """
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        timeout=timedelta(seconds=max(seconds, 1.0)),
        wait_for_workers=False,
        multi_tenant=True,
    )


def init_method(generation: str) -> str:
    """What `init_process_group` takes as its init_method, so that only processes of this generation,
    lower-case, meet.

    >>> init_method("0f3a")
    'fastgessl://0f3a'
    """
    return f"{_SCHEME}://{generation}"


def _meet(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[Store, int, int]]:
    # Not rank 0's own store, which serves: this one ends with the process group.
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )
    yield PrefixStore(urlsplit(url).netloc, store), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


register_rendezvous_handler(_SCHEME, _meet)
