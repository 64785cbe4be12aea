"""Which process of a job has died or never came, said by the ones that are there, within seconds instead of a
collective's time limit.

Every rank keeps one idle TCP connection to rank 0. The operating system closes it with the process, however
that ends, and its keep-alive finds a host that is gone, so that a process that is merely busy is never taken
for dead. Rank 0 tells the others.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.distributed import Store

from fastgessl.config import UsageError
from fastgessl.training.rendezvous import init_method, open_store

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with this process, try the job again."""
# A host without power answers nothing; three unanswered questions, 10 s apart after 10 s of silence, make 40
# s, within a minute.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
# How long a process that stops of itself is given before its peers follow: they may be about to say the same.
_GRACE_SECONDS = 3.0
_LONGEST = 1 << 16
_CONNECT_SECONDS = 10.0
# Of ranks whose collectives fail at once, the first is often not the one that caused it.
_MOST_NAMED = 3
_OPEN = "the hosts of a job must let one another through on every port (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name their network)"
# Where the store says how to reach rank 0. It may still say how to reach the one of before a restart.
_CALL = "fastgessl/rank 0"


@dataclass(frozen=True)
class Job:
    """The processes that have come together. `init_method` is for `init_process_group`: None for a process
    alone.
    """

    init_method: str | None
    joined: Callable[[], None]
    """Call it once this rank's process group has carried its first collective."""


@contextmanager
def watched(seconds: float = 60.0) -> Iterator[Job]:
    """Come together with the other ranks of WORLD_SIZE. Inside, the death of any process ends all the others,
    with exit code 75 and a line on standard error that names it. So does a rank that does not come, or does
    not join, within `seconds` of the last one that did.

    Collective: every rank enters. MASTER_ADDR, which every launcher sets, must be rank 0's address. One
    process alone needs no watch.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Job(None, lambda: None)
        return
    watch = _Hub(world_size, seconds) if rank == 0 else _Spoke(rank, seconds)
    thread = threading.Thread(target=watch.run, name="peers", daemon=True)
    thread.start()
    watch.all_here.wait()
    try:
        yield Job(init_method(watch.token), watch.joined)
    except BaseException as error:
        # A collective fails with a RuntimeError because a peer has died or failed, which the watch says
        # better, ending the process.
        doubtful = isinstance(error, RuntimeError)
        watch.leave(" ".join(f"stopped: {type(error).__name__}: {error}".split())[:300], doubtful=doubtful)
        if doubtful or rank == 0:
            thread.join(timeout=3 * _GRACE_SECONDS)  # until all have been told
        raise
    watch.leave("")
    if rank == 0:
        thread.join(timeout=_GRACE_SECONDS)


def _listener() -> socket.socket:
    # A connection a rank: 1,024 ranks do not fit below the customary soft limit of 1,024 open files.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _own_name(rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
    }


def _end(own: dict[str, Any], gone: dict[str, Any], how: str) -> NoReturn:
    """Say who has gone, once a host, and end this process whatever its main thread is waiting for."""
    if how:
        time.sleep(_GRACE_SECONDS)
    elder = gone["host"] == own["host"] and gone["local_rank"] == 0 and own["local_rank"] == 1
    if own["local_rank"] == 0 or elder:
        where = f" (host {gone['host']}, process {gone['process']})" if gone["host"] else ""
        print(
            f"fastgessl train: rank {gone['rank']}{where} {how or 'has died'}. This job ends with exit code "
            f"{EXIT_CODE}; its newest "
            "checkpoint, if there is one, is complete. Continue with --train.resume if_any.",
            file=sys.stderr,
            flush=True,
        )
    os._exit(EXIT_CODE)


class _Line:
    """A connection that carries one JSON object a line, and the name of who is at its other end, once known."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self._rest = connection, b""
        self.name: dict[str, Any] | None = None

    def send(self, message: dict[str, Any]) -> None:
        # The other side may be gone; whoever listens to it finds out and says so.
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None once the other side is gone, or speaks no such language."""
        try:
            data = self.connection.recv(_LONGEST)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        fits = len(self._rest) < _LONGEST and all(isinstance(message, dict) for message in messages)
        return messages if data and fits else None


class _Spoke:
    """Any rank but 0."""

    def __init__(self, rank: int, seconds: float) -> None:
        self._own, self.all_here = _own_name(rank), threading.Event()
        # Ranks are numbered host by host: this one is on rank 0's host if its number there is its number in
        # the job.
        on_first_host = rank == self._own["local_rank"]
        self._first: dict[str, Any] = {
            "rank": 0,
            "host": self._own["host"] if on_first_host else "",
            "process": "unknown",
            "local_rank": 0,
        }
        self._line, self.token = self._reached(seconds)

    def _reached(self, seconds: float) -> tuple[_Line, str]:
        """A connection to rank 0, which has answered, and the token by which it calls."""
        address, deadline, problem = (
            os.environ["MASTER_ADDR"],
            time.monotonic() + seconds,
            "it has not called",
        )
        while (left := deadline - time.monotonic()) > 0:
            try:
                # TCPStore prints forty lines of C++ for a host that is not there yet.
                socket.create_connection(
                    (address, int(os.environ["MASTER_PORT"])), timeout=min(left, _CONNECT_SECONDS)
                ).close()
                store = open_store(self._own["rank"], left)
                if store.check([_CALL]):
                    call = store.get(_CALL)
                    token, port = json.loads(call)
                    line = _Line(
                        socket.create_connection((address, port), timeout=min(left, _CONNECT_SECONDS))
                    )
                    line.connection.settimeout(None)
                    _keep_alive(line.connection)
                    line.send({"token": token, "name": self._own})
                    if self._answered(line, store, call, deadline):
                        return line, token
                    problem = "it does not answer"
            except (OSError, RuntimeError) as error:
                problem = str(error).split("\n")[0]
            time.sleep(0.2)
        how = f"was not reached at {address} within {seconds:.0f} s ({problem}): MASTER_ADDR must be an address of its host, and {_OPEN}"
        _end(self._own, self._first, how)

    def _answered(self, line: _Line, store: Store, call: bytes, deadline: float) -> bool:
        """Whether rank 0 has taken this rank in; False once another one calls, or what listens there is
        something else.
        """
        while time.monotonic() < deadline and store.get(_CALL) == call:
            if select.select([line.connection], [], [], 0.2)[0]:
                messages = line.receive() or []
                for message in messages:
                    self._take(message)
                return bool(messages)
        return False

    def _take(self, message: dict[str, Any]) -> None:
        if "name" in message:
            self._first = message["name"]
        elif "all" in message:
            self.all_here.set()
        else:
            _end(self._own, message["gone"][0], message["how"])

    def run(self) -> None:
        while (messages := self._line.receive()) is not None:
            for message in messages:
                if "over" in message or self._own in message.get("gone", ()):
                    return
                self._take(message)
        _end(self._own, self._first, "")

    def joined(self) -> None:
        """Tell rank 0 that this rank's process group works."""
        self._line.send({"joined": True})

    def leave(self, how: str, *, doubtful: bool = False) -> None:
        """Tell rank 0 that this rank ends; `how` if something is wrong, which may be a consequence if it is
        doubtful.
        """
        self._line.send({"leaves": how, "doubtful": doubtful})


class _Hub:
    """Rank 0: hears every rank, and tells all of the first that goes, or that they waited for in vain."""

    def __init__(self, world_size: int, seconds: float) -> None:
        self._own, self.token, self.all_here = _own_name(0), secrets.token_hex(16), threading.Event()
        self._world_size, self._seconds = world_size, seconds
        self._awaited, self._deadline = set(range(1, world_size)), time.monotonic() + seconds
        self._members = list[_Line]()
        self._selector = selectors.DefaultSelector()
        self._complaints = list[tuple[dict[str, Any], str]]()
        inside, outside = socket.socketpair()
        self._to_itself, of_itself = _Line(inside), _Line(outside)
        of_itself.name = self._own
        self._selector.register(outside, selectors.EVENT_READ, of_itself)
        self._listener = _listener()
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            self._store = open_store(0, seconds)
        except RuntimeError as error:
            raise UsageError(
                f"rank 0 cannot open the store at {os.environ['MASTER_ADDR']}, port "
                f"{os.environ['MASTER_PORT']} "
                f"({str(error).splitlines()[0]}). MASTER_ADDR must be an address of rank 0's host, and "
                "MASTER_PORT free there."
            ) from None
        self._store.set(_CALL, json.dumps([self.token, self._listener.getsockname()[1]]))

    def run(self) -> None:
        while True:
            left = self._deadline - time.monotonic()
            if left < 0 and not self._complaints:
                self._give_up()
            if left < 0 and self._over(self._complaints):
                return
            for key, _ in self._selector.select(None if left == float("inf") else left):
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    _keep_alive(connection)
                    self._selector.register(connection, selectors.EVENT_READ, _Line(connection))
                elif self._hear(key.data):
                    return

    def joined(self) -> None:
        """Rank 0's process group works."""
        self._to_itself.send({"joined": True})

    def leave(self, how: str, *, doubtful: bool = False) -> None:
        """Rank 0 ends, and with it the watch."""
        self._to_itself.send({"leaves": how, "doubtful": doubtful})

    def _hear(self, line: _Line) -> bool:
        """Take in what a rank says; True if the watch is over."""
        messages = line.receive()
        if messages is None:
            self._selector.unregister(line.connection)
            if line.name is not None:
                self._tell_and_end(line.name, "")
            return False
        for message in messages:
            if secrets.compare_digest(str(message.get("token", "")), self.token):
                line.name = message["name"]
                line.send({"name": self._own})
                self._members.append(line)
                self._arrived(line.name["rank"])
            elif line.name is not None and "joined" in message:
                self._arrived(line.name["rank"])
            elif line.name is not None and "leaves" in message:
                name, how, line.name = line.name, message["leaves"], None
                if message["doubtful"]:
                    self._deadline = self._deadline if self._complaints else time.monotonic() + _GRACE_SECONDS
                    self._complaints.append((name, how))
                elif how or name == self._own:
                    return self._over([(name, how)])
        return False

    def _over(self, ends: list[tuple[dict[str, Any], str]]) -> bool:
        """Tell all of the ranks that end, and end; but the first ones say themselves why, and so does rank 0."""
        ends = ends[:_MOST_NAMED]
        names = [name for name, _ in ends]
        how = "; ".join(
            [ends[0][1], *(f"rank {name['rank']} (host {name['host']}) {said}" for name, said in ends[1:])]
        )
        self._tell({"gone": names, "how": how} if how else {"over": True})
        if self._own not in names:
            _end(self._own, names[0], how)
        return True

    def _arrived(self, rank: int) -> None:
        """First all ranks come; then all join."""
        if rank not in self._awaited or self._complaints:
            return
        self._awaited.remove(rank)
        self._deadline = time.monotonic() + self._seconds
        if not self._awaited and self.all_here.is_set():
            self._deadline = float("inf")
        elif not self._awaited:
            self._awaited = set(range(self._world_size))
            self._tell({"all": True})
            self.all_here.set()

    def _give_up(self) -> NoReturn:
        names = {0: self._own} | {
            line.name["rank"]: line.name for line in self._members if line.name is not None
        }
        first, *others = sorted(self._awaited)
        within = f"within {self._seconds:.0f} s of the last rank that did"
        if others:
            within += f", nor rank {', '.join(map(str, others[:20]))}" + ", ..." * (len(others) > 20)
        gone = names.get(first, {"rank": first, "host": "", "process": "unknown", "local_rank": first})
        if self.all_here.is_set():
            self._tell_and_end(gone, f"has not joined the process group {within}: {_OPEN}")
        hosts = ", ".join(sorted({name["host"] for name in names.values()}))
        self._tell_and_end(
            gone, f"has not come {within}; {len(names)} of {self._world_size} are there, on {hosts}"
        )

    def _tell_and_end(self, gone: dict[str, Any], how: str) -> NoReturn:
        self._tell({"gone": [gone], "how": how})
        _end(self._own, gone, how)

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members:
            member.send(message)
