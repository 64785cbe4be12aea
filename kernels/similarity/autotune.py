"""Find the fastest tile of each kernel on this device and store the table, which the losses read from then
on.

    python -m fastgessl.kernels.similarity.autotune --features 128 256 --rows 8192 --dtypes bfloat16 float32
    --seconds 1200 --out tiles.json

Starts from the shipped tile and changes one of its numbers at a time as long as that is faster. A tile whose
results differ from chunked PyTorch's, or that the device has no room for, is never chosen. The file is
written after each kernel, so that a cut run leaves what it found; a later run keeps the entries that it does
not measure.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgessl.kernels.backend import triton_obstacle
from fastgessl.kernels.similarity import chunked as similarity_chunked
from fastgessl.kernels.similarity import symmetric_chunked, tuned_tiles
from fastgessl.kernels.similarity.chunked import NOTHING, Moments, Parts, Rows, Side
from fastgessl.kernels.similarity.tiles import KERNELS, WIDTHS, WITHOUT_TEACHER, Entry, Tile, width_of
from fastgessl.kernels.similarity.tuned_tiles import Measured

STEPS = {
    "rows": (16, 32, 64, 128),
    "columns": (16, 32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
    "chunk_limit": (16, 32, 64, 128, 256),
}
LARGEST_DIFFERENCE = {True: 1e-4, False: 1.5e-2}
"""In norm, by whether operands are float32."""
FIRST, SECOND = (True, False, False, False), (False, True, False, False)
Needs = tuple[bool, ...]
Work = Callable[[], tuple[Tensor, ...]]
Timer = Callable[[Work], float]
"""Milliseconds of a call."""


def device_milliseconds(work: Work) -> float:
    """Median over 0.1 s on a GPU; of three calls under the interpreter."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(work, warmup=25, rep=100, return_mode="median")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[1]


class Unusable(Exception):
    """A tile that runs and must not be chosen."""


class Problem:
    """Operands on which one entry's kernel is run: M = N rows, as many features as it is to be measured at."""

    def __init__(self, entry: Entry, rows: int, features: int, device: torch.device) -> None:
        self.entry = entry
        generator = torch.Generator(device).manual_seed(0)

        def unit() -> Tensor:
            table = normalize(torch.randn(rows, features, generator=generator, device=device), dim=1)
            return table if entry.float32 else table.bfloat16()

        scale = torch.full((), 10.0, device=device)
        self.student = Side(unit(), unit(), scale, None)
        self.teacher = Side(unit(), unit(), scale, None) if entry.teacher else None
        self.tangent = Parts(unit(), unit(), scale, None)
        self.positives = torch.arange(rows, device=device)
        ones = torch.full((rows,), 1 / rows, device=device)
        self.weights = Rows(ones, -ones, ones if entry.teacher else ones[:0])
        self.saved = similarity_chunked.statistics(self.student, self.teacher, self.positives, None, True)
        self.moments = self._curvature(similarity_chunked, NOTHING, NOTHING, None)[0]

    def results(self, module: Any) -> tuple[Tensor, ...]:
        """What the entry's kernel computes, for the student and, where it can, for the teacher, by
        `similarity.launch` or `_chunked`.
        """
        kernel = self.entry.kernel
        if kernel == "statistics_kernel":
            return tuple(module.statistics(self.student, self.teacher, self.positives, None, True))
        if kernel == "moments_kernel":
            return tuple(self._curvature(module, NOTHING, NOTHING, None)[0])
        chunked = module is similarity_chunked
        if kernel == "symmetric_statistics_kernel":
            return tuple(
                (symmetric_chunked.statistics if chunked else module.symmetric_statistics)(*self.student[:3])
            )
        if kernel == "gradient_rows_kernel[mirror]":
            weights, lse = self.weights._replace(divergence=self.weights.lse), self.saved.lse
            gradients = symmetric_chunked.gradients if chunked else module.symmetric_gradients
            return _present(gradients(weights, *self.student[:3], lse, lse, (True, False, False)))
        wanted = FIRST if "rows" in kernel else SECOND
        to_teacher = wanted if self.entry.teacher else NOTHING
        if kernel.startswith("curvature"):
            return _present(*self._curvature(module, wanted, to_teacher, self.moments)[1:])
        operands = (self.weights, self.student, self.teacher, self.positives, None, self.saved, True)
        return _present(*module.gradients(*operands, wanted, to_teacher))

    def _curvature(
        self, module: Any, needs: Needs, to_teacher: Needs, moments: Moments | None
    ) -> tuple[Moments, Parts, Parts]:
        operands = (
            self.tangent,
            Parts(),
            self.weights,
            self.student,
            self.teacher,
            self.positives,
            None,
            self.saved,
            True,
        )
        return module.curvature(*operands, needs, to_teacher, moments)


def _present(*sides: Parts) -> tuple[Tensor, ...]:
    return tuple(part for side in sides for part in side if part is not None)


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one number, by one step of it."""
    for name, values in STEPS.items():
        at = values.index(getattr(tile, name))
        for other in (at - 1, at + 1):
            if 0 <= other < len(values):
                yield tile._replace(**{name: values[other]})


def search(start: Tile, cost: Callable[[Tile], float]) -> dict[Tile, float]:
    """Costs of the tiles that a descent by single steps tries, each once. Infinity rules a tile out."""
    costs = {start: cost(start)}
    best = start
    while True:
        around = list(neighbours(best))
        costs |= {tile: cost(tile) for tile in around if tile not in costs}
        lowest = min(around, key=costs.__getitem__)
        if costs[lowest] >= costs[best]:
            return costs
        best = lowest


def tune(
    entry: Entry, rows: int, features: int, device: torch.device, timer: Timer, deadline: float
) -> Measured | None:
    """The fastest tile found before the deadline, and put to use; None if none works. Says which tiles it
    leaves out, and why.

    Raises RuntimeError if the device fails: nothing that it computes afterwards would mean anything.
    """
    from fastgessl.kernels.similarity import launch as similarity_launch

    chosen, shipped = tuned_tiles.tuned_tiles(device), tuned_tiles.shipped_tile(entry, device)
    problem = Problem(entry, rows, features, device)
    expected = [part.double() for part in problem.results(similarity_chunked)]

    def measured(tile: Tile) -> float:
        chosen[entry] = tile
        found = problem.results(similarity_launch)
        if not all(
            _close(part, wanted, LARGEST_DIFFERENCE[entry.float32])
            for part, wanted in zip(found, expected, strict=True)
        ):
            raise Unusable("its results differ from chunked PyTorch's")
        return timer(lambda: problem.results(similarity_launch))

    def cost(tile: Tile) -> float:
        if tile != shipped and time.monotonic() > deadline:
            return math.inf
        try:
            return measured(tile)
        except Exception as failure:
            if not _of_the_tile(failure):
                raise
            print(
                f"  {tile} is left out: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}",
                flush=True,
            )
            return math.inf

    costs = search(shipped, cost)
    best = min(costs, key=costs.__getitem__)
    chosen[entry] = best
    if math.isinf(costs[best]):
        del chosen[entry]
        return None
    return Measured(best, costs[best], None if math.isinf(costs[shipped]) else costs[shipped])


def _of_the_tile(failure: Exception) -> bool:
    """Whether another tile may do: wrong results, no room for it on the device, its assembler's refusal, or a
    failed compiler pass.

    The last is a bare RuntimeError, like an error of the device, whose message (CUDA error, Triton Error
    [CUDA]) tells them apart.
    """
    from triton.errors import TritonError

    return isinstance(failure, (Unusable, TritonError)) or (
        type(failure) is RuntimeError and "CUDA" not in str(failure)
    )


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-12)


def entries(
    kernels: Sequence[str], features: Sequence[int], dtypes: Sequence[str]
) -> Iterator[tuple[Entry, int]]:
    """Each entry to measure, with the number of features to measure it at."""
    for width in features:
        for dtype in dtypes:
            for kernel in kernels:
                for teacher in (False, True):
                    if not (teacher and kernel in WITHOUT_TEACHER):
                        yield Entry(kernel, width_of(width), teacher, dtype == "float32"), width


def autotune(
    kernels: Sequence[str], features: Sequence[int], dtypes: Sequence[str], rows: int, seconds: float, out: Path,
    timer: Timer = device_milliseconds,
) -> dict[Entry, Measured]:  # fmt: skip
    """Measure, print and store. Raises ValueError where the Triton kernels cannot run, or where `out` holds
    something else."""
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
    name = tuned_tiles.device_name(device)
    table = tuned_tiles.read(out, name) if out.is_file() else {}
    tuned_tiles.use(device, {entry: found.tile for entry, found in table.items()})
    deadline = time.monotonic() + seconds
    for entry, width in entries(kernels, features, dtypes):
        if time.monotonic() > deadline:
            print(
                f"stopped after {seconds:g} s; the rest keeps its tiles. --kernels and --features choose "
                "what is measured"
            )
            break
        found = tune(entry, rows, width, device, timer, deadline)
        if found is not None:
            table[entry] = found
            tuned_tiles.write(out, name, table)
        print(_line(entry, found), flush=True)
    return table


def _line(entry: Entry, found: Measured | None) -> str:
    what = f"{entry.kernel:28} D<={entry.width:<5} {'float32' if entry.float32 else '16-bit':8} teacher={entry.teacher:d}  "
    if found is None:
        return what + "no tile works here"
    before = "fails" if found.shipped_milliseconds is None else f"{found.shipped_milliseconds:.3f}"
    return what + f"{before} -> {found.milliseconds:.3f} ms  {found.tile}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastgessl.kernels.similarity.autotune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--features", type=int, nargs="+", default=list(WIDTHS[:2]), help="numbers of features to measure at"
    )
    parser.add_argument("--rows", type=int, default=8192, help="queries, and as many keys")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("bfloat16", "float32"),
        default=["bfloat16"],
        help="bfloat16 stands for float16 too",
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--seconds", type=float, default=1200, help="time after which nothing more is tried")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"the table; by default the file that the losses read, which {tuned_tiles.ENVIRONMENT} names",
    )
    given = parser.parse_args()
    out = given.out or tuned_tiles.table_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        autotune(given.kernels, given.features, given.dtypes, given.rows, given.seconds, out)
    except ValueError as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")
    print(out)


if __name__ == "__main__":
    main()
