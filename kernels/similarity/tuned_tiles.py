"""Which tile a launch takes: that of a table measured on this device, if there is one, else the shipped one.

A measured table is a JSON file that `python -m fastgessl.kernels.similarity.autotune` writes. It is looked
for where the environment variable FASTGESSL_TILES says, else in the user's cache folder, under the names of
device and Triton version, so that another card or compiler never reads it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgessl.kernels.backend import triton_version
from fastgessl.kernels.similarity.tiles import INTERPRETED, KERNELS, WIDTHS, Entry, Tile, tile_of, width_of

ENVIRONMENT = "FASTGESSL_TILES"
FORMAT = 1
KINDS = {"16-bit": False, "float32": True}
POWERS = {"rows": (16, 256), "columns": (16, 256), "warps": (1, 16), "chunk_limit": (16, 256)}
STAGES = (1, 8)


class Measured(NamedTuple):
    """A tile, its milliseconds, and those of the shipped tile that it replaces; None where that does not run."""

    tile: Tile
    milliseconds: float
    shipped_milliseconds: float | None


def device_name(device: torch.device) -> str:
    """The card's name as a file name has it; CPU tensors are the interpreter's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_path(device: torch.device) -> Path:
    """Where this device's measured table is, or would be."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_folder / "fastgessl" / f"tiles-{device_name(device)}-triton-{triton_version()}.json"


def tile_for(kernel: str, query: Tensor, features: int, teacher: bool) -> Tile:
    """The tile of a launch on the query's device. Raises ValueError if the device's measured table cannot be
    read.
    """
    entry = Entry(kernel, width_of(features), teacher, query.dtype == torch.float32)
    return tuned_tiles(query.device).get(entry) or shipped_tile(entry, query.device)


def shipped_tile(entry: Entry, device: torch.device) -> Tile:
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return tile_of(entry.kernel, 10 * major + minor, entry.width, entry.teacher, entry.float32)


_in_use: dict[torch.device, dict[Entry, Tile]] = {}


def tuned_tiles(device: torch.device) -> dict[Entry, Tile]:
    """The measured tiles of a device, read once a process; none without a file. Raises ValueError as `read`
    does.
    """
    if device not in _in_use:
        path = table_path(device)
        # os.path's, because Path.is_file raises PermissionError where the home folder belongs to someone else
        # (docker run --user).
        if os.path.isfile(path):
            use(device, {entry: measured.tile for entry, measured in read(path, device_name(device)).items()})
        elif os.environ.get(ENVIRONMENT):
            raise ValueError(
                f"{ENVIRONMENT} names {path}, which is no file to be seen. Unset it, or let python -m "
                "fastgessl.kernels.similarity.autotune write it."
            )
        else:
            use(device, {})
    return _in_use[device]


def use(device: torch.device, tiles: dict[Entry, Tile]) -> None:
    """From now on launches on the device take these tiles, whatever a file says."""
    _in_use[device] = tiles


def read(path: Path, device: str) -> dict[Entry, Measured]:
    """The tiles in a file, checked. Raises ValueError that names the file, the entry and what is wrong with
    it.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, Mapping) or table.get("format") != FORMAT:
            raise ValueError(f"it is no table of format {FORMAT}")
        if table.get("device") != device:
            raise ValueError(f"it was measured on {table.get('device')!r}, this device is {device!r}")
        if not isinstance(table.get("tiles"), list):
            raise ValueError("tiles must be a list")
        return dict(_entry(f"tiles[{number}]", part) for number, part in enumerate(table["tiles"]))
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"tile table {path}: {problem}. Delete it, and measure anew with python -m "
            "fastgessl.kernels.similarity.autotune."
        ) from problem


def _entry(where: str, part: Any) -> tuple[Entry, Measured]:
    if (
        not isinstance(part, Mapping)
        or not isinstance(part.get("tile"), Mapping)
        or set(part["tile"]) != set(Tile._fields)
    ):
        raise ValueError(
            f"{where} must have kernel, features, teacher, dtype, and a tile of {', '.join(Tile._fields)}; "
            f"found {part}"
        )
    for name, allowed in (
        ("kernel", KERNELS),
        ("features", WIDTHS),
        ("teacher", (False, True)),
        ("dtype", tuple(KINDS)),
    ):
        if part.get(name) not in allowed:
            raise ValueError(
                f"{where}: {name} must be one of {', '.join(map(str, allowed))}, found {part.get(name)!r}"
            )
    for name, value in part["tile"].items():
        low, high = POWERS.get(name, STAGES)
        whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        if not whole or (name in POWERS and value & (value - 1)):
            kind = "a power of two" if name in POWERS else "a number"
            raise ValueError(f"{where}: {name} must be {kind} from {low} to {high}, found {value!r}")
    milliseconds = part.get("milliseconds")
    if not isinstance(milliseconds, int | float):
        raise ValueError(f"{where}: milliseconds must be a number, found {milliseconds!r}")
    entry = Entry(part["kernel"], part["features"], part["teacher"], KINDS[part["dtype"]])
    return entry, Measured(Tile(**part["tile"]), float(milliseconds), part.get("shipped_milliseconds"))


def write(path: Path, device: str, measured: Mapping[Entry, Measured]) -> None:
    """Store a table; readers see the old file or the new one, never half of it."""
    kinds = {float32: name for name, float32 in KINDS.items()}
    tiles = [
        {
            "kernel": entry.kernel,
            "features": entry.width,
            "teacher": entry.teacher,
            "dtype": kinds[entry.float32],
        }
        | {
            name: value._asdict() if isinstance(value, Tile) else value
            for name, value in found._asdict().items()
        }
        for entry, found in measured.items()
    ]
    table = {
        "format": FORMAT,
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version(),
        "tiles": tiles,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    unfinished.replace(path)
