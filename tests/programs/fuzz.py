"""Damaged and hostile files for every parser of a run: python tests/programs/fuzz.py SECONDS [SEED [PARSER
...]]. Prints one JSON line.

A parser may read a file or refuse it with a UsageError or DataError. Anything else, anything that starts a
process or writes a file, and whatever takes longer than ten seconds is a finding; its input is kept in the
folder fastgessl-fuzz of the temporary files.
"""

import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgessl import pipelines, runs
from fastgessl.config import UsageError
from fastgessl.recipes import load
from fastgessl.runs import checkpoint

REFUSALS = (UsageError, pipelines.DataError)
_WORDS = (
    b"\x00",
    b"\xff" * 8,
    b"-1",
    b"9" * 30,
    b"1e400",
    b"nan",
    b"../" * 9,
    b"!!python/object/apply:os.system [id]",
    b"cos\nsystem\n",
    b"*a &a",
)


def valid_files(folder: Path) -> dict[str, bytes]:
    """One good file for each parser, by the name of the parser."""
    state = {
        "objective": {"weight": torch.ones(3, 2)},
        "optimizer": {"state": {}, "param_groups": []},
        "loader": {"epoch": 1},
    }
    rest = {"scaler": None, "probe": None, "ranks": [], "skipped": 0}
    saved = checkpoint.save(folder, 3, state | rest, keep=1)
    arrays, picture, shard = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(
        arrays,
        train_x=np.zeros((6, 8, 8, 3), np.uint8),
        train_y=np.arange(6),
        classes=np.array(list("abcdef")),
    )
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(picture, "JPEG")
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for name, content in (
            ("a/0.jpg", picture.getvalue()),
            ("a/0.cls", b"1"),
            ("b/1.jpg", picture.getvalue()),
            ("b/1.cls", b"0"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    config = (
        b"train: {epochs: 3, seed: 1}\noptim:\n  base_lr: 0.1\nviews: {crop_scale: [0.2, 1.0]}\n"
        b"evaluate: {tasks: [knn]}\n"
    )
    return {
        "recipe": config,
        "config": config,
        "metrics": b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n',
        "checkpoint": (saved / "state.pt").read_bytes(),
        "npz": arrays.getvalue(),
        "shard": shard.getvalue(),
        "photo": picture.getvalue(),
    }


def parsers(folder: Path) -> dict[str, Callable[[bytes], object]]:
    """What reads each kind of file, as the commands do."""

    def written(name: str, content: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def photo(content: bytes) -> object:
        images = pipelines.open_images("folder", written("photos/a/0.jpg", content).parents[1])
        assert images is not None
        views = [pipelines.evaluation_view(8, mean=(0.5,) * 3, std=(0.5,) * 3)]
        loader = pipelines.build(images, views, batch_size=1, engine="dali", training=False, workers=1)
        try:
            return list(loader)
        finally:
            loader.close()

    return {
        "recipe": lambda content: load(str(written("mine.yaml", content))),
        "config": lambda content: runs.read_config(written("run/config.yaml", content).parent),
        "metrics": lambda content: runs.JsonLines(written("metrics.jsonl", content), 2).close(),
        "checkpoint": lambda content: checkpoint.load(written("step-000000003/state.pt", content).parent),
        "npz": lambda content: pipelines.open_images("npz", written("images.npz", content)),
        "shard": lambda content: pipelines.open_images("shards", written("images.tar", content)),
        "photo": photo,
    }


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, cut, doubled, or replaced by words that parsers stumble over."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 4, 32, 256))
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] = chance.randrange(256)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        elif kind == 3:
            data[place : place + len(word)] = (word := chance.choice(_WORDS))
        else:
            data[place:place] = chance.choice(_WORDS)
    return bytes(data)


def mutated_archive(content: bytes, chance: random.Random) -> bytes:
    """A zip file whose members are changed and whose checksums are right, so that the damage reaches the
    parser inside.
    """
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(out, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new,
    ):
        members = archive.namelist()
        victim = chance.choice(members)
        for name in members:
            if name != victim or chance.random() < 0.9:
                new.writestr(
                    name, mutated(archive.read(name), chance) if name == victim else archive.read(name)
                )
    return out.getvalue()


class _TooLong(BaseException):
    pass


def _alarm(*_: object) -> None:
    raise _TooLong


class Watch:
    """Hears of every process that is started, and every file written outside `allowed`, while it is on."""

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.on, self.heard = str(allowed), False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        started = event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
        )
        written = (
            event == "open"
            and set(str(arguments[1] or "")) & set("wax+")
            and not str(arguments[0]).startswith(self.allowed)
        )
        if started or (written and str(arguments[0]) != os.devnull):
            self.heard.append(f"{event} {arguments[:2]}")


def _outcome(read: Callable[[bytes], object], content: bytes, watch: Watch) -> str:
    """read, refused, or what else happened."""
    signal.alarm(10)
    watch.on = True
    try:
        read(content)
        outcome = "read"
    except REFUSALS as error:
        outcome = "a message of several lines" if "\n" in str(error) else "refused"
    except (Exception, _TooLong) as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        watch.on = False
        signal.alarm(0)
    heard, watch.heard = watch.heard, []
    return heard[0] if heard else outcome


def fuzz(seconds: float, seed: int, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Mutate the files of all `kinds` (all, if none are named) for so long."""
    chance = random.Random(seed)
    signal.signal(signal.SIGALRM, _alarm)
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, watch = Path(name), Watch(Path(name))
        files, reading = valid_files(folder / "valid"), parsers(folder / "bad")
        counts = {kind: {"read": 0, "refused": 0} for kind in kinds or files}
        for kind in counts:
            reading[kind](files[kind])  # the good file is good
        # Decoding a photo takes a hundred times as long as all else together.
        drawn = [kind for kind in counts for _ in range(1 if kind == "photo" else 20)]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind = chance.choice(drawn)
            archive = kind in ("npz", "checkpoint") and chance.random() < 0.7
            content = (mutated_archive if archive else mutated)(files[kind], chance)
            outcome = _outcome(reading[kind], content, watch)
            if outcome in counts[kind]:
                counts[kind][outcome] += 1
            elif (finding := f"{kind}: {' '.join(outcome.split())[:100]}") not in findings and len(
                findings
            ) < 100:
                findings[finding] = _kept(kind, content)
    return {
        "inputs": sum(sum(count.values()) for count in counts.values()),
        "by_parser": counts,
        "findings": findings,
    }


def _kept(kind: str, content: bytes) -> str:
    folder = Path(tempfile.gettempdir()) / "fastgessl-fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}-{len(list(folder.iterdir()))}"
    path.write_bytes(content)
    return path.name


if __name__ == "__main__":
    # What swells in memory shall fail here, and not take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(json.dumps(fuzz(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:])))
