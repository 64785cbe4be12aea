"""Find the fastest tile of each kernel on this device and store the table that the losses read from then on.

    python -m bench.autotune --features 128 256 --dtypes bfloat16 float32 --seconds 1200 --out tiles.json

Starts from the shipped tile and changes one of its numbers at a time as long as that is faster. A tile whose
results differ from chunked PyTorch's, or that does not run, is never chosen. The file is written after each
kernel, so that a cut run leaves what it found; a later run keeps the entries that it does not measure.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench import results
from fastgessl.kernels.backend import triton_obstacle, triton_version
from fastgessl.kernels.similarity import chunked, symmetric, tiles
from fastgessl.kernels.similarity.chunked import NOTHING
from fastgessl.kernels.similarity.problem import PairWeights, RowWeights, Side, SideValues
from fastgessl.kernels.similarity.tiles import KERNELS, WITHOUT_TEACHER, Entry, Tile

STEPS = {
    "rows": (16, 32, 64, 128),
    "columns": (16, 32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
    "chunk_limit": (16, 32, 64, 128, 256),
}
FIRST, SECOND = (True, False, False, False), (False, True, False, False)


class Work:
    """What one entry's kernel computes, on as many keys as queries, by any implementation."""

    def __init__(self, entry: Entry, rows: int, features: int, device: torch.device) -> None:
        self.entry = entry
        generator = torch.Generator(device).manual_seed(0)

        def unit() -> Tensor:
            table = normalize(torch.randn(rows, features, generator=generator, device=device), dim=1)
            return table if entry.float32 else table.bfloat16()

        scale = torch.full((), 10.0, device=device)
        self.student = Side(unit(), unit(), scale, None)
        self.teacher = Side(unit(), unit(), scale, None) if entry.teacher else None
        self.tangent = SideValues(unit(), unit(), scale, None)
        self.positives = torch.arange(rows, device=device)
        ones = torch.full((rows,), 1 / rows, device=device)
        self.weights = RowWeights(ones, -ones, ones if entry.teacher else ones[:0])
        self.saved = chunked.statistics(self.student, self.teacher, self.positives, None, True)
        self.moments = self._curvature(chunked)[0]
        self.expected = self.results(chunked)

    def results(self, module: Any) -> list[Tensor]:
        """What the kernel gives to the student and, where it can, the teacher, by `chunked` or `launch`."""
        kernel, pair = self.entry.kernel, self.student[:3]
        if kernel == "statistics_kernel":
            return list(module.statistics(self.student, self.teacher, self.positives, None, True))
        if kernel == "moments_kernel":
            return list(self._curvature(module)[0])
        if kernel == "symmetric_statistics_kernel":
            of_pairs = symmetric.chunked_statistics if module is chunked else module.symmetric_statistics
            return list(of_pairs(*pair))
        if kernel == "gradient_rows_kernel[mirror]":
            weights, lse = (
                PairWeights(self.weights.lse, self.weights.lse, self.weights.positive),
                self.saved.lse,
            )
            to_pairs = symmetric.chunked_gradients if module is chunked else module.symmetric_gradients
            return _present(to_pairs(weights, *pair, lse, lse, (True, False, False)))
        needs = FIRST if "rows" in kernel else SECOND
        to_teacher = needs if self.entry.teacher else NOTHING
        if kernel.startswith("curvature"):
            return _present(*self._curvature(module, needs, to_teacher, self.moments)[1:])
        operands = (self.weights, self.student, self.teacher, self.positives, None, self.saved, True)
        return _present(*module.gradients(*operands, needs, to_teacher))

    def _curvature(
        self, module: Any, needs: Any = NOTHING, to_teacher: Any = NOTHING, moments: Any = None
    ) -> Any:
        sides = (self.weights, self.student, self.teacher, self.positives, None, self.saved, True)
        return module.curvature(self.tangent, SideValues(), *sides, needs, to_teacher, moments)

    def milliseconds(self) -> float:
        """Of one call with the tile in use. Raises ValueError where results differ from chunked PyTorch's."""
        from fastgessl.kernels.similarity import launch

        tolerance = 1e-4 if self.entry.float32 else 1.5e-2
        for found, expected in zip(self.results(launch), self.expected, strict=True):
            if (found.double() - expected.double()).norm() > tolerance * max(float(expected.norm()), 1e-12):
                raise ValueError("its results differ from chunked PyTorch's")
        if torch.cuda.is_available():
            from triton.testing import do_bench

            return do_bench(lambda: self.results(launch), warmup=25, rep=100, return_mode="median")
        started = time.perf_counter()
        self.results(launch)
        return 1e3 * (time.perf_counter() - started)


def _present(*sides: SideValues) -> list[Tensor]:
    return [part for side in sides for part in side if part is not None]


def neighbors(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one number, by one step of it."""
    for name, values in STEPS.items():
        at = values.index(getattr(tile, name))
        yield from (
            tile._replace(**{name: value}) for value in values[max(0, at - 1) : at + 2] if value != values[at]
        )


def tune(work: Work, device: torch.device, deadline: float) -> tuple[Tile, float, float]:
    """The fastest tile found before the deadline, its milliseconds and the shipped tile's; inf if none works.

    Says which tiles it leaves out, and why. Raises what the device raises if it fails: nothing that it
    computes afterwards would mean anything.
    """
    entry, in_use = work.entry, dict(tiles.measured_tiles(device))
    shipped = tiles.shipped_tile(entry, device)

    def cost(tile: Tile) -> float:
        if tile != shipped and time.monotonic() > deadline:
            return math.inf
        tiles.use(device, in_use | {entry: tile})
        try:
            return work.milliseconds()
        except Exception as failure:
            if not _of_the_tile(failure):
                raise
            reason = " ".join(str(failure).split())[:200]
            print(f"  {tile} is left out: {type(failure).__name__}: {reason}", flush=True)
            return math.inf

    costs = {shipped: cost(shipped)}
    best = shipped
    while True:
        around = list(neighbors(best))
        costs |= {tile: cost(tile) for tile in around if tile not in costs}
        nearest = min(around, key=costs.__getitem__)
        if costs[nearest] >= costs[best]:
            break
        best = nearest
    tiles.use(device, in_use if math.isinf(costs[best]) else in_use | {entry: best})
    return best, costs[best], costs[shipped]


def _of_the_tile(failure: Exception) -> bool:
    """Whether another tile may do: wrong results, no room on the device, its assembler's refusal, or a failed
    compiler pass.

    The last is a bare RuntimeError, like an error of the device, whose message (CUDA error, Triton Error
    [CUDA]) tells them apart.
    """
    from triton.errors import TritonError

    bare = type(failure) in (RuntimeError, ValueError)
    return isinstance(failure, TritonError) or (bare and "CUDA" not in str(failure))


def _entries(given: argparse.Namespace) -> Iterator[tuple[Entry, int]]:
    """Each entry to measure, with the number of features to measure it at."""
    for features in given.features:
        for dtype in given.dtypes:
            for kernel in given.kernels:
                for teacher in (False, True):
                    if not (teacher and kernel in WITHOUT_TEACHER):
                        yield Entry(kernel, tiles.width_of(features), teacher, dtype == "float32"), features


def store(path: Path, rows: dict[Entry, dict[str, Any]], device: torch.device) -> None:
    """Write a table."""
    listed = [{"entry": entry._asdict(), **row} for entry, row in rows.items()]
    head = {"device": tiles.device_name(device), "torch": torch.__version__, "triton": triton_version()}
    results.replaced(path, json.dumps({**head, "tiles": listed}, indent=1) + "\n")


def autotune(given: argparse.Namespace) -> Path:
    """Measure, print and store. Raises ValueError where the Triton kernels cannot run, or where the file
    holds something else.
    """
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    obstacle = triton_obstacle(torch.empty(1, 1, device=device, dtype=torch.bfloat16))
    if obstacle:
        raise ValueError(
            f"tiles are measured on an NVIDIA GPU of compute capability 8.0 or newer; here: {obstacle}."
        )
    out = given.out or tiles.table_path(device)
    rows: dict[Entry, dict[str, Any]] = {}
    if out.is_file():
        tiles.use(device, tiles.read(out, tiles.device_name(device)))
        listed = json.loads(out.read_text())["tiles"]
        rows = {Entry(**row.pop("entry")): row for row in listed}
    else:
        tiles.use(device, {})
    deadline = time.monotonic() + given.seconds
    for entry, features in _entries(given):
        if time.monotonic() > deadline:
            print(
                f"stopped after {given.seconds:g} s; the rest keeps its tiles. --kernels and --features "
                "choose "
                "what is measured"
            )
            break
        tile, best, shipped = tune(Work(entry, given.rows, features, device), device, deadline)
        if math.isfinite(best):
            before = shipped if math.isfinite(shipped) else None
            rows[entry] = {"tile": tile._asdict(), "milliseconds": best, "shipped_milliseconds": before}
            store(out, rows, device)
        print(f"{entry}: {shipped:.3f} -> {best:.3f} ms  {tile}", flush=True)
    return out


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.autotune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--features", type=int, nargs="+", default=[128, 256], help="numbers of features to measure at"
    )
    parser.add_argument("--rows", type=int, default=8192, help="queries, and as many keys")
    dtypes = ("bfloat16", "float32")
    parser.add_argument(
        "--dtypes", nargs="+", choices=dtypes, default=["bfloat16"], help="bfloat16 stands for float16 too"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--seconds", type=float, default=1200, help="time after which nothing more is tried")
    parser.add_argument(
        "--out", type=Path, help=f"the table; by default the one that the losses read ({tiles.ENVIRONMENT})"
    )
    try:
        print(autotune(parser.parse_args(words)))
    except ValueError as problem:
        sys.exit(f"{parser.prog}: {problem}")


if __name__ == "__main__":
    main()
