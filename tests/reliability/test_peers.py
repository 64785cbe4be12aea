"""When a process dies the others stop within seconds, with its name; when all is well nobody notices the watch."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from reliability.forked import forked

from fastgessl.config import UsageError
from fastgessl.peers import EXIT_CODE, watched


def joined(rank: int, world_size: int) -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert PartialState(cpu=True).num_processes == world_size
    assert torch.distributed.get_rank() == rank


def stuck() -> None:
    """Inside a collective that never ends, as the survivors of a real job are."""
    torch.distributed.barrier()
    time.sleep(600)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_and_the_others_stop_at_once(tmp_path, victim):
    def work(rank):
        joined(rank, 3)
        with watched(rank, 3):
            torch.distributed.barrier()
            if rank == victim:
                print(os.getpid(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)

    started = time.monotonic()
    ends = forked(3, work, tmp_path)
    assert time.monotonic() - started < 30
    assert [code for code, _ in ends] == [-9 if rank == victim else EXIT_CODE for rank in range(3)]
    speaker = 1 if victim == 0 else 0
    process = ends[victim][1].strip()
    assert f"rank {victim} (host {socket.gethostname()}, process {process}) has died" in ends[speaker][1]
    assert "Traceback" not in ends[speaker][1]
    assert [rank for rank, (_, said) in enumerate(ends) if "has died" in said] == [speaker]


def test_ranks_that_wait_in_a_collective_stop_too(tmp_path):
    def work(rank):
        joined(rank, 3)
        with watched(rank, 3):
            torch.distributed.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            stuck()

    ends = forked(3, work, tmp_path)
    assert [code for code, _ in ends] == [EXIT_CODE, -9, EXIT_CODE]
    assert "rank 1" in ends[0][1]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_raises_tells_the_others_why(tmp_path, failing):
    def work(rank):
        joined(rank, 2)
        with watched(rank, 2):
            torch.distributed.barrier()
            if rank == failing:
                raise ValueError("photo 17 is\nbroken")
            time.sleep(600)

    ends = forked(2, work, tmp_path)
    assert [code for code, _ in ends] == [1 if rank == failing else EXIT_CODE for rank in range(2)]
    other = ends[1 - failing][1]
    assert failing == 1 or f"rank {failing} (host" in other
    assert "photo 17 is broken" in other


def test_ranks_that_end_well_end_well_in_any_order(tmp_path):
    def work(rank):
        joined(rank, 3)
        with watched(rank, 3):
            torch.distributed.barrier()
            time.sleep(0.3 * ((rank + 1) % 3))
        time.sleep(0.2)

    assert [code for code, _ in forked(3, work, tmp_path)] == [0, 0, 0]


def test_a_stranger_who_knocks_and_hangs_up_stops_nobody(tmp_path):
    def work(rank):
        joined(rank, 2)
        ports = []
        create = socket.create_server

        def remembered(*args, **kwargs):
            server = create(*args, **kwargs)
            ports.append(server.getsockname()[1])
            return server

        socket.create_server = remembered
        with watched(rank, 2):
            torch.distributed.barrier()
            for message in (
                b"",
                b"GET / HTTP/1.1\r\n\r\n",
                b'{"token": "guess", "name": 1}\n',
                b"[1]\n",
                b"\xff" * 100_000,
                b'{"first": "x"}\n',
            ):
                for port in ports:
                    with socket.create_connection(("localhost", port)) as stranger:
                        stranger.sendall(message)
            time.sleep(0.5)
            torch.distributed.barrier()

    assert [code for code, _ in forked(2, work, tmp_path)] == [0, 0]


def test_an_address_of_rank_0_that_is_not_its_is_refused_with_the_reason(monkeypatch):
    from fastgessl import peers

    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UsageError, match=r"rank 3 cannot reach rank 0 at localhost"):
        peers._Spoke(3, "token", port)
