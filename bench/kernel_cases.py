"""What `bench.kernels` compares: losses, passes, peers, what each needs, and the floor that the machine sets.

Work is the least that any way of computing needs, with the table stored for nothing; ours computes it anew
instead and is given no credit for that. A matmul unit is 2·M·N·D operations: forward 1, forward and backward
3, with the double backward 9; NT-Xent 1/2, 3/2 and 9/2, as its table is symmetric. Exponentials: M·N, half of
that for NT-Xent, twice for CLIP's two softmaxes. Floor of a pass: the larger of its operations and its
exponentials at the rates measured in the same run.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench import results
from bench.timing import clock
from fastgessl.kernels import NTXentLoss, clip_loss, info_nce, nt_xent

FEATURES, TEMPERATURE = 128, 0.1
Loss = Callable[[Tensor, Tensor], Tensor]


def dense_info_nce(query: Tensor, key: Tensor) -> Tensor:
    """The three lines that people write."""
    return cross_entropy(query @ key.T / TEMPERATURE, torch.arange(len(query), device=query.device))


def dense_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    rows = normalize(torch.cat([first, second]), dim=1)
    index = torch.arange(len(rows), device=rows.device)
    table = (rows @ rows.T / TEMPERATURE).masked_fill(index[:, None] == index, -torch.inf)
    return cross_entropy(table, index.roll(len(first)))


def dense_clip(image: Tensor, text: Tensor) -> Tensor:
    table, index = image @ text.T / TEMPERATURE, torch.arange(len(image), device=image.device)
    return (cross_entropy(table, index) + cross_entropy(table.T, index)) / 2


def lightly_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)(first, second)


def autocast(criterion: Callable[[], torch.nn.Module]) -> Loss:
    """The migration example: whatever NTXentLoss a script imports, behind a linear projector, under autocast
    to bfloat16.
    """

    def loss(first: Tensor, second: Tensor) -> Tensor:
        projector = torch.eye(FEATURES, device=first.device)
        with torch.autocast(first.device.type, dtype=torch.bfloat16):
            return criterion()(first @ projector, second @ projector)

    return loss


def lightly_criterion() -> torch.nn.Module:
    from lightly.loss import NTXentLoss as Lightlys

    return Lightlys(temperature=TEMPERATURE)


def inf_cl_info_nce(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(query, key, scale=1 / TEMPERATURE).mean()


def cut_info_nce(query: Tensor, key: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(query / TEMPERATURE, key, torch.arange(len(query), device=query.device))


PEERS: dict[str, dict[str, Loss]] = {
    "info_nce": {
        "ours": lambda query, key: info_nce(query, key, temperature=TEMPERATURE),
        "dense": dense_info_nce,
        "compiled dense": torch.compile(dense_info_nce),
        "inf-cl": inf_cl_info_nce,
        "cut-cross-entropy": cut_info_nce,
    },
    "nt_xent": {
        "ours": lambda first, second: nt_xent(first, second, temperature=TEMPERATURE),
        "dense": dense_nt_xent,
        "compiled dense": torch.compile(dense_nt_xent),
        "lightly": lightly_nt_xent,
    },
    "nt_xent autocast": {
        "ours": autocast(partial(NTXentLoss, temperature=TEMPERATURE)),
        "lightly": autocast(lightly_criterion),
    },
    "clip": {
        "ours": lambda image, text: clip_loss(image, text, temperature=TEMPERATURE),
        "dense": dense_clip,
        "compiled dense": torch.compile(dense_clip),
    },
}
PASSES = ("forward", "backward", "double backward")
UNITS = {
    "info_nce": (1, 3, 9),
    "nt_xent": (0.5, 1.5, 4.5),
    "nt_xent autocast": (0.5, 1.5, 4.5),
    "clip": (1, 3, 9),
}
EXPONENTIALS = {"info_nce": 1, "nt_xent": 0.5, "nt_xent autocast": 0.5, "clip": 2}
PACKAGES = {"lightly": "lightly", "inf-cl": "inf_cl", "cut-cross-entropy": "cut_cross_entropy"}
GPU_ONLY = ("inf-cl", "cut-cross-entropy")
TABLES = {"dense": 5, "lightly": 8, "compiled dense": 4}
"""About how many (M, N) arrays a backward of the peer holds at once."""


class Case(NamedTuple):
    """One bar of a comparison: `rows` queries and as many keys (pairs, for NT-Xent: twice as many rows)."""

    loss: str
    pass_: str
    rows: int
    peer: str

    def __str__(self) -> str:
        return f"{self.loss}, {self.pass_}, {self.rows} rows, {self.peer}"

    @property
    def entries(self) -> int:
        """Similarities in the table."""
        return (self.rows * (2 if self.loss.startswith("nt_xent") else 1)) ** 2

    @property
    def operations(self) -> float:
        return UNITS[self.loss][PASSES.index(self.pass_)] * 2 * self.entries * FEATURES

    @property
    def exponentials(self) -> float:
        return EXPONENTIALS[self.loss] * self.entries


def obstacle(case: Case, device: str) -> str | None:
    """Why a case is not measured, which its row then says; None if it is."""
    package = PACKAGES.get(case.peer)
    if package and importlib.util.find_spec(package) is None:
        return f"{case.peer} is not installed"
    if case.peer in GPU_ONLY and device != "cuda":
        return f"{case.peer} needs a GPU"
    if case.pass_ == "double backward" and case.peer in (*GPU_ONLY, "compiled dense"):
        return f"{case.peer} has no second derivative"
    if device == "cpu" and case.peer == "compiled dense" and case.rows != 1024:
        return "compiling takes a minute a size: at 1,024 rows only"
    if device == "cpu" and case.entries > (2**32 if case.pass_ == "backward" else 2**27):
        return "minutes a call"
    needed = TABLES.get(case.peer, 0) * 4 * case.entries
    if needed > available_bytes(device) / 2:
        return f"its table needs about {needed / 2**30:.0f} GiB"
    return None


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return 1024 * _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _kibibytes(path: Path, field: str) -> int:
    return int(next(line for line in path.read_text().splitlines() if line.startswith(field)).split()[1])


def operands(size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(size)
    key = normalize(torch.randn(size, FEATURES, generator=generator, device=device), dim=1)
    query = normalize(
        key + 1.5 * normalize(torch.randn(size, FEATURES, generator=generator, device=device), dim=1), dim=1
    )
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def run(case: Case, query: Tensor, key: Tensor) -> None:
    """One call of the pass: forward, forward + backward, or both and the gradient of the gradient's squared
    norm.
    """
    loss = PEERS[case.loss][case.peer]
    if case.pass_ == "forward":
        with torch.no_grad():
            loss(query, key)
    else:
        value = loss(query, key)
        first = torch.autograd.grad(value, (query, key), create_graph=case.pass_ != "backward")
        if case.pass_ != "backward":
            torch.autograd.grad(
                torch.stack([gradient.square().sum() for gradient in first]).sum(), (query, key)
            )
    if query.is_cuda:
        torch.cuda.synchronize()


@cache
def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations and exponentials a second at best: of a large matmul and of exp over an array, the best of
    some calls.
    """
    side, count = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 20)
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    source, target = torch.randn(2, count, device=device)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "operations": (2 * side**3, lambda: left @ right),
        "exponentials": (count, lambda: torch.exp2(source, out=target)),
    }
    return {name: amount / min(_seconds(call) for _ in range(10)) for name, (amount, call) in work.items()}


def _seconds(call: Callable[[], object]) -> float:
    started = clock()()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()() - started


def floor_seconds(case: Case, device: str, dtype: torch.dtype) -> float:
    best = rates(device, torch.bfloat16 if "autocast" in case.loss else dtype)
    return max(case.operations / best["operations"], case.exponentials / best["exponentials"])


def peak_bytes(case: Case, device: str, dtype: torch.dtype) -> int:
    """Peak memory of a pass above its inputs: the allocator's on a GPU, a process's own resident memory on a
    CPU.
    """
    if device == "cuda":
        query, key = operands(case.rows, device, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, query, key)
        return torch.cuda.max_memory_allocated() - before
    return int(in_a_process(case)["peak_bytes"])


def in_a_process(case: Case) -> dict[str, float]:
    """Seconds and peak bytes of a single call on the CPU, in a process of its own."""
    command = [sys.executable, "-m", "bench.kernel_cases", *map(str, case)]
    done = subprocess.run(command, cwd=results.ROOT.parent, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _single_call(case: Case) -> dict[str, float]:
    """Memory is this process's peak above what it holds once the inputs are there and a tiny call has warmed
    up.
    """
    status = Path("/proc/self/status")
    run(case, *operands(32, "cpu", torch.float32))
    query, key = operands(case.rows, "cpu", torch.float32)
    before = _kibibytes(status, "VmRSS")
    seconds = _seconds(lambda: run(case, query, key))
    return {"seconds": seconds, "peak_bytes": 1024 * max(0, _kibibytes(status, "VmHWM") - before)}


if __name__ == "__main__":
    given_loss, given_pass, given_rows, given_peer = sys.argv[1:]
    print(json.dumps(_single_call(Case(given_loss, given_pass, int(given_rows), given_peer))))
