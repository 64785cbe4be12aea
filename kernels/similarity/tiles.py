"""Which tile a launch takes: that of a table measured on this device, if there is one, else the shipped one.

Shipped: one tile by kernel, generation of card, number of features and teacher. Every entry compiles ahead of time
without a stack frame (no spilled register) and within the shared memory of its cards, under Triton 3.6 and 3.9; the test
that says so prints the table. Tiles near 255 registers spill under one of the two and not the other. Which entries are
fastest has not been measured yet: each is among the largest that fit.

Measured: a JSON file that `python -m bench.autotune` writes. It is looked for where the environment variable
FASTGESSL_TILES says, else in the user's cache folder, under the names of device and Triton version, so that another card
or compiler never reads it.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastgessl.kernels.backend import triton_version

ENVIRONMENT = "FASTGESSL_TILES"


class Tile(NamedTuple):
    """BLOCK_M rows by BLOCK_N columns of the similarity table, and how the program is built."""

    rows: int
    columns: int
    warps: int
    stages: int
    chunk_limit: int
    """Most features that are held at once."""

    def chunk(self, features: int) -> int:
        """Features contracted at once: a power of two, as Triton wants."""
        return min(self.chunk_limit, max(16, 1 << (features - 1).bit_length()))


ARCHITECTURES = (80, 86, 89, 90, 100, 120)
WIDTHS = (128, 256, 2048)
INTERPRETED = Tile(32, 32, 4, 1, 128)

TABLE: dict[tuple[str, int, int], tuple[Tile, Tile]] = {
    ("statistics_kernel", 80, 128): (Tile(128, 128, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("symmetric_statistics_kernel", 80, 128): (Tile(128, 128, 8, 2, 128), Tile(128, 128, 8, 2, 128)),
    ("gradient_rows_kernel", 80, 128): (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("gradient_rows_kernel[mirror]", 80, 128): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_columns_kernel", 80, 128): (Tile(64, 128, 8, 3, 128), Tile(64, 128, 8, 3, 128)),
    ("moments_kernel", 80, 128): (Tile(128, 64, 8, 2, 128), Tile(64, 64, 8, 2, 128)),
    ("curvature_rows_kernel", 80, 128): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("curvature_columns_kernel", 80, 128): (Tile(32, 128, 8, 3, 128), Tile(32, 128, 8, 3, 128)),
    ("statistics_kernel", 80, 256): (Tile(128, 64, 8, 3, 256), Tile(64, 64, 4, 2, 256)),
    ("symmetric_statistics_kernel", 80, 256): (Tile(128, 128, 8, 2, 64), Tile(128, 128, 8, 2, 64)),
    ("gradient_rows_kernel", 80, 256): (Tile(64, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256)),
    ("gradient_rows_kernel[mirror]", 80, 256): (Tile(64, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256)),
    ("gradient_columns_kernel", 80, 256): (Tile(32, 64, 8, 3, 256), Tile(32, 64, 4, 3, 256)),
    ("moments_kernel", 80, 256): (Tile(64, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256)),
    ("curvature_rows_kernel", 80, 256): (Tile(32, 32, 8, 2, 256), Tile(128, 32, 8, 3, 64)),
    ("curvature_columns_kernel", 80, 256): (Tile(32, 64, 8, 2, 256), Tile(32, 64, 8, 2, 256)),
    ("statistics_kernel", 80, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("symmetric_statistics_kernel", 80, 2048): (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("gradient_rows_kernel", 80, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("gradient_rows_kernel[mirror]", 80, 2048): (Tile(64, 32, 8, 2, 128), Tile(64, 32, 8, 2, 128)),
    ("gradient_columns_kernel", 80, 2048): (Tile(32, 64, 8, 2, 64), Tile(32, 64, 8, 2, 64)),
    ("moments_kernel", 80, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("curvature_rows_kernel", 80, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("curvature_columns_kernel", 80, 2048): (Tile(32, 64, 8, 2, 64), Tile(32, 64, 8, 2, 64)),
    ("statistics_kernel", 86, 128): (Tile(128, 128, 8, 3, 128), Tile(128, 64, 8, 2, 128)),
    ("symmetric_statistics_kernel", 86, 128): (Tile(128, 128, 8, 3, 32), Tile(128, 128, 8, 3, 32)),
    ("gradient_rows_kernel", 86, 128): (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 2, 128)),
    ("gradient_rows_kernel[mirror]", 86, 128): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_columns_kernel", 86, 128): (Tile(64, 128, 8, 3, 128), Tile(64, 64, 8, 2, 128)),
    ("moments_kernel", 86, 128): (Tile(128, 64, 8, 2, 128), Tile(64, 64, 8, 2, 128)),
    ("curvature_rows_kernel", 86, 128): (Tile(128, 32, 8, 3, 128), Tile(64, 32, 8, 2, 64)),
    ("curvature_columns_kernel", 86, 128): (Tile(32, 128, 8, 3, 128), Tile(32, 64, 8, 2, 128)),
    ("statistics_kernel", 86, 256): (Tile(128, 64, 8, 2, 256), Tile(64, 32, 4, 2, 256)),
    ("symmetric_statistics_kernel", 86, 256): (Tile(128, 64, 8, 2, 256), Tile(128, 64, 8, 2, 256)),
    ("gradient_rows_kernel", 86, 256): (Tile(64, 32, 8, 2, 256), Tile(128, 32, 8, 2, 64)),
    ("gradient_rows_kernel[mirror]", 86, 256): (Tile(64, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256)),
    ("gradient_columns_kernel", 86, 256): (Tile(32, 64, 4, 3, 256), Tile(32, 64, 8, 2, 64)),
    ("moments_kernel", 86, 256): (Tile(64, 32, 8, 2, 256), Tile(64, 64, 8, 2, 64)),
    ("curvature_rows_kernel", 86, 256): (Tile(128, 32, 8, 2, 64), Tile(128, 32, 8, 2, 32)),
    ("curvature_columns_kernel", 86, 256): (Tile(32, 128, 8, 2, 64), Tile(32, 128, 8, 2, 32)),
    ("statistics_kernel", 86, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("symmetric_statistics_kernel", 86, 2048): (Tile(64, 64, 8, 2, 128), Tile(64, 64, 8, 2, 128)),
    ("gradient_rows_kernel", 86, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("gradient_rows_kernel[mirror]", 86, 2048): (Tile(64, 32, 8, 2, 128), Tile(64, 32, 8, 2, 128)),
    ("gradient_columns_kernel", 86, 2048): (Tile(32, 64, 8, 2, 64), Tile(32, 64, 8, 2, 64)),
    ("moments_kernel", 86, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("curvature_rows_kernel", 86, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("curvature_columns_kernel", 86, 2048): (Tile(32, 64, 8, 2, 64), Tile(32, 64, 8, 2, 64)),
    ("statistics_kernel", 90, 128): (Tile(128, 128, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("symmetric_statistics_kernel", 90, 128): (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("gradient_rows_kernel", 90, 128): (Tile(128, 128, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("gradient_rows_kernel[mirror]", 90, 128): (Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 2, 128)),
    ("gradient_columns_kernel", 90, 128): (Tile(64, 128, 8, 3, 128), Tile(64, 128, 8, 3, 128)),
    ("moments_kernel", 90, 128): (Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 2, 128)),
    ("curvature_rows_kernel", 90, 128): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("curvature_columns_kernel", 90, 128): (Tile(32, 128, 8, 3, 128), Tile(32, 128, 8, 3, 128)),
    ("statistics_kernel", 90, 256): (Tile(128, 64, 8, 3, 256), Tile(64, 64, 4, 2, 256)),
    ("symmetric_statistics_kernel", 90, 256): (Tile(128, 64, 8, 3, 256), Tile(128, 64, 8, 3, 256)),
    ("gradient_rows_kernel", 90, 256): (Tile(128, 64, 8, 3, 256), Tile(128, 32, 8, 3, 256)),
    ("gradient_rows_kernel[mirror]", 90, 256): (Tile(128, 32, 8, 3, 256), Tile(128, 32, 8, 3, 256)),
    ("gradient_columns_kernel", 90, 256): (Tile(64, 128, 8, 2, 256), Tile(32, 128, 8, 3, 256)),
    ("moments_kernel", 90, 256): (Tile(64, 64, 8, 2, 256), Tile(64, 32, 8, 2, 256)),
    ("curvature_rows_kernel", 90, 256): (Tile(128, 32, 8, 3, 256), Tile(128, 32, 8, 2, 64)),
    ("curvature_columns_kernel", 90, 256): (Tile(32, 128, 8, 2, 256), Tile(32, 128, 8, 2, 64)),
    ("statistics_kernel", 90, 2048): (Tile(128, 64, 8, 3, 128), Tile(64, 32, 4, 2, 128)),
    ("symmetric_statistics_kernel", 90, 2048): (Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("gradient_rows_kernel", 90, 2048): (Tile(128, 64, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_rows_kernel[mirror]", 90, 2048): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_columns_kernel", 90, 2048): (Tile(32, 128, 8, 3, 128), Tile(32, 128, 8, 3, 128)),
    ("moments_kernel", 90, 2048): (Tile(128, 64, 8, 2, 128), Tile(64, 32, 8, 2, 128)),
    ("curvature_rows_kernel", 90, 2048): (Tile(128, 32, 8, 3, 64), Tile(128, 32, 8, 3, 64)),
    ("curvature_columns_kernel", 90, 2048): (Tile(32, 64, 8, 2, 128), Tile(32, 128, 8, 3, 64)),
    ("statistics_kernel", 100, 128): (Tile(128, 128, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("symmetric_statistics_kernel", 100, 128): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_rows_kernel", 100, 128): (Tile(128, 128, 8, 3, 128), Tile(128, 64, 8, 3, 128)),
    ("gradient_rows_kernel[mirror]", 100, 128): (Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 2, 128)),
    ("gradient_columns_kernel", 100, 128): (Tile(64, 128, 8, 2, 128), Tile(64, 64, 8, 2, 128)),
    ("moments_kernel", 100, 128): (Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 2, 128)),
    ("curvature_rows_kernel", 100, 128): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("curvature_columns_kernel", 100, 128): (Tile(32, 128, 8, 3, 128), Tile(32, 64, 8, 2, 128)),
    ("statistics_kernel", 100, 256): (Tile(128, 64, 8, 3, 256), Tile(64, 64, 4, 2, 256)),
    ("symmetric_statistics_kernel", 100, 256): (Tile(128, 32, 8, 2, 64), Tile(128, 32, 8, 2, 64)),
    ("gradient_rows_kernel", 100, 256): (Tile(128, 64, 8, 3, 256), Tile(64, 32, 4, 3, 256)),
    ("gradient_rows_kernel[mirror]", 100, 256): (Tile(128, 32, 8, 3, 256), Tile(128, 32, 8, 3, 256)),
    ("gradient_columns_kernel", 100, 256): (Tile(32, 128, 8, 2, 256), Tile(32, 64, 4, 3, 256)),
    ("moments_kernel", 100, 256): (Tile(128, 64, 8, 2, 64), Tile(64, 32, 8, 2, 256)),
    ("curvature_rows_kernel", 100, 256): (Tile(64, 64, 8, 1, 256), Tile(64, 16, 8, 2, 256)),
    ("curvature_columns_kernel", 100, 256): (Tile(32, 64, 8, 1, 256), Tile(16, 64, 8, 2, 256)),
    ("statistics_kernel", 100, 2048): (Tile(128, 64, 8, 3, 128), Tile(64, 32, 4, 2, 128)),
    ("symmetric_statistics_kernel", 100, 2048): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_rows_kernel", 100, 2048): (Tile(128, 64, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_rows_kernel[mirror]", 100, 2048): (Tile(128, 32, 8, 3, 128), Tile(128, 32, 8, 3, 128)),
    ("gradient_columns_kernel", 100, 2048): (Tile(32, 64, 8, 2, 64), Tile(32, 128, 8, 3, 128)),
    ("moments_kernel", 100, 2048): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 128)),
    ("curvature_rows_kernel", 100, 2048): (Tile(64, 32, 8, 2, 64), Tile(128, 32, 8, 3, 64)),
    ("curvature_columns_kernel", 100, 2048): (Tile(32, 64, 8, 2, 128), Tile(32, 64, 8, 2, 64)),
}
"""16-bit operands: by kernel, generation and largest number of features, without and with a teacher."""

FLOAT32: dict[tuple[str, int], tuple[Tile, Tile]] = {
    ("statistics_kernel", 80): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 8, 2, 32)),
    ("symmetric_statistics_kernel", 80): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 8, 2, 32)),
    ("gradient_rows_kernel", 80): (Tile(64, 32, 8, 2, 32), Tile(16, 16, 2, 1, 16)),
    ("gradient_rows_kernel[mirror]", 80): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 8, 2, 32)),
    ("gradient_columns_kernel", 80): (Tile(32, 64, 8, 2, 32), Tile(32, 32, 8, 2, 32)),
    ("moments_kernel", 80): (Tile(16, 32, 4, 1, 32), Tile(16, 32, 4, 1, 16)),
    ("curvature_rows_kernel", 80): (Tile(16, 16, 2, 1, 16), Tile(16, 16, 2, 1, 16)),
    ("curvature_columns_kernel", 80): (Tile(32, 16, 2, 1, 16), Tile(16, 16, 2, 1, 16)),
    ("statistics_kernel", 86): (Tile(64, 32, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("symmetric_statistics_kernel", 86): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 8, 2, 32)),
    ("gradient_rows_kernel", 86): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 4, 1, 32)),
    ("gradient_rows_kernel[mirror]", 86): (Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32)),
    ("gradient_columns_kernel", 86): (Tile(32, 128, 8, 3, 32), Tile(32, 64, 4, 1, 32)),
    ("moments_kernel", 86): (Tile(64, 32, 8, 2, 32), Tile(16, 32, 4, 1, 16)),
    ("curvature_rows_kernel", 86): (Tile(16, 32, 4, 1, 16), Tile(16, 16, 2, 1, 16)),
    ("curvature_columns_kernel", 86): (Tile(32, 16, 4, 1, 16), Tile(16, 16, 2, 1, 16)),
    ("statistics_kernel", 90): (Tile(64, 64, 8, 2, 32), Tile(64, 64, 8, 2, 32)),
    ("symmetric_statistics_kernel", 90): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 8, 2, 32)),
    ("gradient_rows_kernel", 90): (Tile(128, 32, 8, 1, 64), Tile(64, 32, 8, 2, 32)),
    ("gradient_rows_kernel[mirror]", 90): (Tile(128, 32, 8, 1, 64), Tile(128, 32, 8, 1, 64)),
    ("gradient_columns_kernel", 90): (Tile(32, 128, 8, 1, 64), Tile(32, 64, 4, 2, 32)),
    ("moments_kernel", 90): (Tile(64, 32, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("curvature_rows_kernel", 90): (Tile(16, 32, 4, 1, 32), Tile(16, 32, 4, 1, 32)),
    ("curvature_columns_kernel", 90): (Tile(32, 128, 8, 2, 32), Tile(32, 16, 4, 1, 32)),
    ("statistics_kernel", 100): (Tile(64, 32, 8, 2, 32), Tile(32, 32, 4, 1, 32)),
    ("symmetric_statistics_kernel", 100): (Tile(64, 32, 8, 2, 64), Tile(64, 32, 8, 2, 64)),
    ("gradient_rows_kernel", 100): (Tile(64, 32, 8, 2, 32), Tile(64, 32, 8, 2, 32)),
    ("gradient_rows_kernel[mirror]", 100): (Tile(32, 32, 4, 1, 32), Tile(32, 32, 4, 1, 32)),
    ("gradient_columns_kernel", 100): (Tile(32, 64, 8, 2, 32), Tile(32, 64, 8, 2, 32)),
    ("moments_kernel", 100): (Tile(16, 32, 4, 1, 32), Tile(16, 32, 4, 1, 32)),
    ("curvature_rows_kernel", 100): (Tile(16, 32, 4, 1, 32), Tile(16, 32, 4, 1, 32)),
    ("curvature_columns_kernel", 100): (Tile(32, 16, 4, 1, 32), Tile(32, 16, 4, 1, 32)),
}
"""float32 operands, whose tiles take twice the memory and three products of tf32 each: in narrow chunks for
every width."""


def generation(architecture: int) -> int:
    """Whose column of the table serves an architecture: 80 (A100), 86 (consumer cards, 99 KiB of shared
    memory), 90 (H100), 100 (B200).
    """
    if architecture >= 120:
        return 86
    return max(known for known in (80, 86, 90, 100) if known <= architecture)


def tile_of(kernel: str, architecture: int, features: int, teacher: bool, float32: bool) -> Tile:
    """The entry for `features`; beyond the widest column its chunks serve any number."""
    column = generation(architecture)
    if float32:
        return FLOAT32[kernel, column][teacher]
    return TABLE[kernel, column, width_of(features)][teacher]


def width_of(features: int) -> int:
    """The column of the table that serves a number of features."""
    return next((width for width in WIDTHS if features <= width), WIDTHS[-1])


KERNELS = tuple(dict.fromkeys(kernel for kernel, _, _ in TABLE))
WITHOUT_TEACHER = ("symmetric_statistics_kernel", "gradient_rows_kernel[mirror]")


class Entry(NamedTuple):
    """What a tile is chosen by on one device."""

    kernel: str
    width: int
    teacher: bool
    float32: bool


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
    return measured_tiles(query.device).get(entry) or shipped_tile(entry, query.device)


def shipped_tile(entry: Entry, device: torch.device) -> Tile:
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return tile_of(entry.kernel, 10 * major + minor, entry.width, entry.teacher, entry.float32)


_in_use: dict[torch.device, dict[Entry, Tile]] = {}


def measured_tiles(device: torch.device) -> dict[Entry, Tile]:
    """The measured tiles of a device, read once a process; none without a file. Raises ValueError as `read`
    does.
    """
    if device not in _in_use:
        path = table_path(device)
        # os.path's, because Path.is_file raises PermissionError where the home folder belongs to someone else
        # (docker run --user).
        if os.path.isfile(path):
            use(device, read(path, device_name(device)))
        elif os.environ.get(ENVIRONMENT):
            raise ValueError(
                f"{ENVIRONMENT} names {path}, which is no file to be seen. Unset it, or let python -m "
                "bench.autotune write it."
            )
        else:
            use(device, {})
    return _in_use[device]


def use(device: torch.device, tiles: dict[Entry, Tile]) -> None:
    """From now on launches on the device take these tiles, whatever a file says."""
    _in_use[device] = tiles


def read(path: Path, device: str) -> dict[Entry, Tile]:
    """The tiles in a file. Raises ValueError that names the file and what is wrong with it."""
    try:
        table = json.loads(path.read_text())
        if table["device"] != device:
            raise ValueError(f"it was measured on {table['device']!r}, this device is {device!r}")
        found = {Entry(**part["entry"]): Tile(**part["tile"]) for part in table["tiles"]}
        wrong = [
            tile for tile in found.values() if not all(type(number) is int and number > 0 for number in tile)
        ]
        if wrong:
            raise ValueError(f"a tile is made of whole numbers above 0, found {wrong[0]}")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"tile table {path}: {type(problem).__name__}: {problem}. Delete it, and measure again with "
            "`python -m bench.autotune`."
        ) from problem
    return found
