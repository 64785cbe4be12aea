"""Which process of a job has died, said by the ones that are left, within seconds instead of a collective's time limit.

Every rank keeps one idle TCP connection to rank 0. The operating system closes it with the process, however that ends, and its
keep-alive finds a host that is gone, so that a process that is merely busy is never taken for dead. Rank 0 tells the others.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list

from fastgessl.config import UsageError

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with this process, try the job again."""
# A host without power answers nothing; three unanswered questions, 10 s apart after 10 s of silence, make 40 s, within a minute.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
# How long a process that stops of itself is given before its peers follow: they may be about to say the same.
_GRACE_SECONDS = 3.0
_LONGEST = 1 << 16


@contextmanager
def watched(rank: int, world_size: int) -> Iterator[None]:
    """Inside, the death of any process ends all the others with exit code 75 and a line on standard error that names it.

    Collective: every rank enters. One process alone needs no watch. MASTER_ADDR, which every launcher sets, must be rank 0's address.
    UsageError if rank 0 cannot be reached there.
    """
    if world_size == 1:
        yield
        return
    listener = _listener() if rank == 0 else None
    token, port = broadcast_object_list([(secrets.token_hex(16), listener.getsockname()[1]) if listener else None])[0]
    watch = _Hub(listener, token) if listener else _Spoke(rank, token, port)
    thread = threading.Thread(target=watch.run, name="peers", daemon=True)
    thread.start()
    watch.entered()
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError):
            # A collective fails like this because a peer has died, which the watch says better, ending the process.
            thread.join(timeout=_GRACE_SECONDS)
        watch.leave(" ".join(f"stopped: {type(error).__name__}: {error}".split())[:500])
        if rank == 0:
            thread.join(timeout=_GRACE_SECONDS)  # until all have been told
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
    return {"rank": rank, "host": socket.gethostname(), "process": os.getpid(), "local_rank": int(os.environ.get("LOCAL_RANK", "0"))}


def _end(own: dict[str, Any], gone: dict[str, Any], how: str) -> NoReturn:
    """Say who has gone, once a host, and end this process whatever its main thread is waiting for."""
    if how:
        time.sleep(_GRACE_SECONDS)
    elder = gone["host"] == own["host"] and gone["local_rank"] == 0 and own["local_rank"] == 1
    if own["local_rank"] == 0 or elder:
        print(
            f"fastgessl train: rank {gone['rank']} (host {gone['host']}, process {gone['process']}) {how or 'has died'}. This job ends "
            f"with exit code {EXIT_CODE}; its newest checkpoint is complete. Continue with --train.resume auto.",
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

    def __init__(self, rank: int, token: str, port: int) -> None:
        address = os.environ["MASTER_ADDR"]
        self._own = _own_name(rank)
        self._first: dict[str, Any] = {"rank": 0, "host": address, "process": "unknown", "local_rank": 0}
        self._known = threading.Event()
        try:
            connection = socket.create_connection((address, port), timeout=60.0)
        except OSError as error:
            raise UsageError(
                f"rank {rank} cannot reach rank 0 at {address}, port {port} ({error}). MASTER_ADDR must be an address of rank 0's host, "
                "and the hosts of a job must let one another through on every port, as gloo and NCCL need too."
            ) from None
        connection.settimeout(None)
        _keep_alive(connection)
        self._line = _Line(connection)
        self._line.send({"token": token, "name": self._own})

    def run(self) -> None:
        while (messages := self._line.receive()) is not None:
            for message in messages:
                if "name" in message:
                    self._first = message["name"]
                    self._known.set()
                elif "over" in message:
                    return
                else:
                    _end(self._own, message["gone"], message["how"])
        _end(self._own, self._first, "")

    def entered(self) -> None:
        """Wait until rank 0 has taken this rank in, and each knows the other's name."""
        self._known.wait(timeout=60.0)

    def leave(self, how: str) -> None:
        """Tell rank 0 that this rank ends; `how` if something is wrong."""
        self._line.send({"leaves": how})


class _Hub:
    """Rank 0: hears every rank, and tells all of the first that goes."""

    def __init__(self, listener: socket.socket, token: str) -> None:
        self._own, self._token = _own_name(0), token
        self._listener, self._members = listener, list[_Line]()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        inside, outside = socket.socketpair()
        self._to_itself = _Line(inside)
        self._selector.register(outside, selectors.EVENT_READ, _Line(outside))

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    _keep_alive(connection)
                    self._selector.register(connection, selectors.EVENT_READ, _Line(connection))
                elif self._hear(key.data):
                    return

    def entered(self) -> None:
        """Rank 0 waits for nobody: a rank that does not come is noticed in the next collective."""

    def leave(self, how: str) -> None:
        """Rank 0 ends, and with it the watch."""
        self._to_itself.send({"first": how})

    def _hear(self, line: _Line) -> bool:
        """Take in what a rank says; True if the watch is over."""
        messages = line.receive()
        if messages is None:
            self._selector.unregister(line.connection)
            if line.name is not None:
                self._tell_and_end(line.name, "")
            return False
        for message in messages:
            if "first" in message and line.connection.family == socket.AF_UNIX:
                self._tell({"gone": self._own, "how": message["first"]} if message["first"] else {"over": True})
                return True
            if secrets.compare_digest(str(message.get("token", "")), self._token):
                line.name = message["name"]
                line.send({"name": self._own})
                self._members.append(line)
            elif line.name is not None and message.get("leaves"):
                self._tell_and_end(line.name, message["leaves"])
            elif "leaves" in message:
                line.name = None
        return False

    def _tell_and_end(self, gone: dict[str, Any], how: str) -> NoReturn:
        self._tell({"gone": gone, "how": how})
        _end(self._own, gone, how)

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members:
            member.send(message)
