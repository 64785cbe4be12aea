"""When a process dies the others stop within seconds, with its name; when all is well nobody notices the
watch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from functools import partial

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from reliability.forked import forked
from torch.distributed import TCPStore

from fastgessl.config import UsageError
from fastgessl.training.peers import _CALL, EXIT_CODE, Job, watched


def join(job: Job, rank: int, world_size: int) -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert PartialState(cpu=True, init_method=job.init_method).num_processes == world_size
    assert torch.distributed.get_rank() == rank
    torch.distributed.barrier()
    job.joined()


def stuck() -> None:
    """Inside a collective that never ends, as the survivors of a real job are."""
    torch.distributed.barrier()
    time.sleep(600)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_and_the_others_stop_at_once(tmp_path, victim):
    def work(rank):
        with watched() as job:
            join(job, rank, 3)
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
        with watched() as job:
            join(job, rank, 3)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            stuck()

    ends = forked(3, work, tmp_path)
    assert [code for code, _ in ends] == [EXIT_CODE, -9, EXIT_CODE]
    assert "rank 1" in ends[0][1]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_raises_tells_the_others_why(tmp_path, failing):
    def work(rank):
        with watched() as job:
            join(job, rank, 2)
            if rank == failing:
                raise ValueError("photo 17 is\nbroken")
            time.sleep(600)

    ends = forked(2, work, tmp_path)
    assert [code for code, _ in ends] == [1 if rank == failing else EXIT_CODE for rank in range(2)]
    other = ends[1 - failing][1]
    assert failing == 1 or f"rank {failing} (host" in other
    assert "photo 17 is broken" in other


@pytest.mark.parametrize("dies", [False, True])
def test_a_rank_whose_collective_fails_because_of_another_names_the_other(tmp_path, dies):
    def work(rank):
        with watched() as job:
            join(job, rank, 3)
            if rank == 1 and dies:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            if rank < 2:
                time.sleep(0.2 * rank)
                raise RuntimeError(["connection closed by peer", "out of memory"][rank])
            time.sleep(600)

    ends = forked(3, work, tmp_path)
    assert [code for code, _ in ends] == ([EXIT_CODE, -9, EXIT_CODE] if dies else [1, 1, EXIT_CODE])
    if dies:
        assert (
            "rank 1 (host" in ends[0][1]
            and "has died" in ends[0][1]
            and "connection closed" not in ends[0][1]
        )
    else:
        assert "RuntimeError: connection closed by peer" in ends[0][1]
        assert "RuntimeError: out of memory" in ends[1][1]


def test_of_ranks_that_fail_at_once_all_are_named_to_the_others(tmp_path):
    def work(rank):
        os.environ["LOCAL_RANK"] = "0"  # each on a host of its own
        with watched() as job:
            join(job, rank, 3)
            if rank:
                time.sleep(0.2 * rank)
                raise RuntimeError(["", "connection closed by peer", "out of memory"][rank])
            time.sleep(600)

    ends = forked(3, work, tmp_path)
    assert [code for code, _ in ends] == [EXIT_CODE, 1, 1]
    assert re.search(
        r"rank 1 \(.*\) stopped: RuntimeError: connection .*; rank 2 \(.*\) stopped: RuntimeError: out of",
        ends[0][1],
    )


def test_ranks_that_end_well_end_well_in_any_order(tmp_path):
    def work(rank):
        with watched() as job:
            join(job, rank, 3)
            time.sleep(0.3 * ((rank + 1) % 3))
        time.sleep(0.2)

    assert [code for code, _ in forked(3, work, tmp_path)] == [0, 0, 0]


def test_a_stranger_who_knocks_and_hangs_up_stops_nobody(tmp_path):
    def work(rank):
        ports = []
        create = socket.create_server

        def remembered(*args, **kwargs):
            server = create(*args, **kwargs)
            ports.append(server.getsockname()[1])
            return server

        socket.create_server = remembered
        with watched() as job:
            join(job, rank, 2)
            for message in (
                b"",
                b"GET / HTTP/1.1\r\n\r\n",
                b'{"token": "guess", "name": 1}\n',
                b"[1]\n",
                b"\xff" * 100_000,
                b'{"leaves": "x"}\n',
                b'{"joined": true}\n',
            ):
                for port in ports:
                    with socket.create_connection(("localhost", port)) as stranger:
                        stranger.sendall(message)
            time.sleep(0.5)
            torch.distributed.barrier()

    assert [code for code, _ in forked(2, work, tmp_path)] == [0, 0]


def test_a_rank_that_does_not_come_is_named_and_nobody_waits_longer(tmp_path):
    def work(rank):
        if rank not in (1, 3):
            with watched(1.5):
                raise AssertionError("not all have come")

    ends = forked(4, work, tmp_path)
    assert [code for code, _ in ends] == [EXIT_CODE, 0, EXIT_CODE, 0]
    assert (
        "rank 1 has not come within 2 s of the last rank that did, nor rank 3; 2 of 4 are there, on "
        f"{socket.gethostname()}. This job ends with exit code 75"
    ) in ends[0][1]
    assert [said.count("\n") for _, said in ends] == [1, 0, 0, 0]  # once a host


def test_a_rank_0_that_does_not_come_is_named_by_its_neighbour(tmp_path):
    def work(rank):
        if rank:
            with watched(1.5):
                raise AssertionError("rank 0 has not come")

    ends = forked(3, work, tmp_path)
    assert [code for code, _ in ends] == [0, EXIT_CODE, EXIT_CODE]
    assert (
        f"rank 0 (host {socket.gethostname()}, process unknown) was not reached at localhost within 2 s"
        in ends[1][1]
    )
    assert [said.count("\n") for _, said in ends] == [0, 1, 0]


def test_a_rank_that_comes_but_does_not_join_the_process_group_is_named(tmp_path):
    def work(rank):
        with watched(1.5) as job:
            if rank == 1:
                time.sleep(600)
            join(job, rank, 3)

    ends = forked(3, work, tmp_path)
    assert [code for code, _ in ends] == [EXIT_CODE] * 3
    assert "process group within 2 s of the last rank that did" in ends[0][1]


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_started_again_on_one_store_do_not_call_those_of_before(tmp_path, late):
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def work(rank, *, fails):
        os.environ |= {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        # Whoever comes first finds in the store what the others wrote there before they were started again.
        time.sleep(0.5 * (rank == late))
        with watched(20.0) as job:
            join(job, rank, 3)
            if fails and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            torch.distributed.barrier()

    for fails, codes in (
        (True, [EXIT_CODE, -9, EXIT_CODE]),
        (True, [EXIT_CODE, -9, EXIT_CODE]),
        (False, [0, 0, 0]),
    ):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        ends = forked(3, partial(work, fails=fails), tmp_path)
        assert [code for code, _ in ends] == codes, ends


def test_a_rank_0_of_before_whose_port_is_somebody_elses_is_not_waited_for(tmp_path):
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    silent = socket.create_server(("localhost", 0))
    agent.set(_CALL, json.dumps(["0" * 32, silent.getsockname()[1]]))

    def work(rank):
        os.environ |= {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        time.sleep(1.0 * (rank == 0))
        with watched(10.0) as job:
            join(job, rank, 2)

    assert [code for code, _ in forked(2, work, tmp_path)] == [0, 0]


def test_a_port_that_is_taken_is_refused_with_what_to_change(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        for name, value in {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": taken.getsockname()[1],
            "RANK": 0,
            "WORLD_SIZE": 2,
        }.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(
                UsageError, match=r"rank 0 cannot open the store at localhost, port .*MASTER_PORT free there"
            ),
            watched(),
        ):
            pass
