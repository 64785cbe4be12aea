"""The similarity losses against dense PyTorch and others: time, memory, plots.

`python -m bench.kernels [--sizes 256 1024 …] [--seconds 20] [--out DIR]`, on the GPU if there is one. Peers are timed in turns, call by
call, so that a noisy machine hits all alike; D = 128. Memory is the peak above the inputs, of a process of its own on a CPU. What does
not fit is left out.

Work of a pass, for the effective rate: 2·M·N·D operations a matmul unit; forward 1, backward 4 (2 if queries are keys, on a GPU), double
backward 13.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench import results
from fastgessl.kernels import implementation_for, info_nce, nt_xent

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


def lightly_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)(first, second)


def inf_cl_info_nce(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(query, key, scale=1 / TEMPERATURE).mean()


PEERS: dict[str, dict[str, Loss]] = {
    "info_nce": {
        "ours": lambda query, key: info_nce(query, key, temperature=TEMPERATURE),
        "dense": dense_info_nce,
        "reference": lambda query, key: info_nce(query, key, temperature=TEMPERATURE, implementation="reference"),
        "compiled dense": torch.compile(dense_info_nce),
        "inf-cl": inf_cl_info_nce,
    },
    "nt_xent": {
        "ours": lambda first, second: nt_xent(first, second, temperature=TEMPERATURE),
        "dense": dense_nt_xent,
        "lightly": lightly_nt_xent,
        "compiled dense": torch.compile(dense_nt_xent),
    },
}
NEEDS = {"lightly": "lightly", "inf-cl": "inf_cl"}
PASSES = ("forward", "backward", "double backward")
UNITS = {"forward": 1, "backward": 5, "double backward": 18}
TABLES = {"dense": 5, "reference": 24, "lightly": 8, "compiled dense": 4}
"""About how many (M, N) arrays a backward of the peer holds at once; the reference counts more, for it takes long."""


def available(device: str) -> dict[str, dict[str, Loss]]:
    """Peers that are installed and run on the device. torch.compile on a CPU needs a C++ compiler and minutes: on a GPU only."""

    def runs(name: str) -> bool:
        installed = name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None
        return installed and (device == "cuda" or name not in ("compiled dense", "inf-cl"))

    return {loss: {name: peer for name, peer in peers.items() if runs(name)} for loss, peers in PEERS.items()}


def operands(size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(size)
    key = normalize(torch.randn(size, FEATURES, generator=generator, device=device), dim=1)
    query = normalize(key + 1.5 * normalize(torch.randn(size, FEATURES, generator=generator, device=device), dim=1), dim=1)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def run(loss: Loss, pass_: str, query: Tensor, key: Tensor) -> None:
    """One call of the pass: forward, forward + backward, or both and the gradient of the gradient's squared norm."""
    if pass_ == "forward":
        with torch.no_grad():
            loss(query, key)
        return
    value = loss(query, key)
    first = torch.autograd.grad(value, (query, key), create_graph=pass_ != "backward")
    if pass_ != "backward":
        torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in first]).sum(), (query, key))


def entries(loss: str, size: int) -> int:
    """Similarities in the table."""
    return (size * (2 if loss == "nt_xent" else 1)) ** 2


def passes(loss: str, size: int, device: str) -> tuple[str, ...]:
    """On a CPU what takes minutes a call is left out."""
    if device == "cuda" or entries(loss, size) <= 2**28:
        return PASSES
    return PASSES[:2] if entries(loss, size) <= 2**32 else ()


def fits(peer: str, loss: str, size: int, device: str) -> bool:
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line).split()[1]) * 1024
    return TABLES.get(peer, 0) * 4 * entries(loss, size) < memory / 3


def times(peers: dict[str, Loss], pass_: str, size: int, device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each peer, in turns until the budget is spent; a call longer than the budget is its own warm-up."""
    query, key = operands(size, device, dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in peers}
    for name in list(peers):
        started = time.perf_counter()
        try:
            run(peers[name], pass_, query, key)
        except RuntimeError as obstacle:  # a peer without a second derivative; ours is never left out
            if name == "ours":
                raise
            print(f"  {name} has no {pass_} at {size}: {str(obstacle).splitlines()[0][:80]}")
            taken.pop(name)
            continue
        wait()
        if time.perf_counter() - started > seconds:
            taken[name].append(time.perf_counter() - started)
    short = [name for name, measured in taken.items() if not measured]
    begin, rounds = time.perf_counter(), 0
    while short and (not rounds or (time.perf_counter() - begin < seconds and rounds < 500)):
        for name in short:
            wait()
            started = time.perf_counter()
            run(peers[name], pass_, query, key)
            wait()
            taken[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: statistics.median(measured) for name, measured in taken.items()}


def peak_bytes(loss: str, peer: str, pass_: str, size: int, device: str, dtype: torch.dtype) -> int:
    """Peak memory of a pass above its inputs."""
    if device == "cuda":
        query, key = operands(size, device, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(PEERS[loss][peer], pass_, query, key)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "bench.kernels", "--measure-memory", loss, peer, pass_, str(size)]
    found = subprocess.run(command, cwd=results.ROOT.parent, capture_output=True, text=True, check=True)
    return int(found.stdout.strip().splitlines()[-1])


def measure_memory(loss: str, peer: str, pass_: str, size: str) -> None:
    """Print this process's peak resident bytes above what it holds once the inputs are there and a tiny call has warmed up."""

    def resident(field: str) -> int:
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1]) * 1024

    run(PEERS[loss][peer], pass_, *operands(32, "cpu", torch.float32))
    query, key = operands(int(size), "cpu", torch.float32)
    before = resident("VmRSS")
    run(PEERS[loss][peer], pass_, query, key)
    print(max(0, resident("VmHWM") - before))


def measure(sizes: list[int], device: str, dtype: torch.dtype, seconds: float, memory_sizes: list[int]) -> list[dict[str, Any]]:
    rows = []
    for loss, peers in available(device).items():
        for size in sizes:
            fitting = {name: peer for name, peer in peers.items() if fits(name, loss, size, device)}
            for pass_ in passes(loss, size, device):
                taken = times(fitting, pass_, size, device, dtype, seconds)
                operations = UNITS[pass_] * 2 * entries(loss, size) * FEATURES
                for name, median in taken.items():
                    row = {"loss": loss, "pass": pass_, "rows": size, "peer": name, "seconds": median, "tflops": operations / median / 1e12}
                    if size in memory_sizes and pass_ == "backward":
                        row["peak_bytes"] = peak_bytes(loss, name, pass_, size, device, dtype)
                    rows.append(row)
                print(line(loss, pass_, size, taken), flush=True)
    return rows


def line(loss: str, pass_: str, size: int, taken: dict[str, float]) -> str:
    ours = taken["ours"]
    others = "  ".join(f"{name} {1e3 * seconds:.3g} ms (ours {ours / seconds:.2f}x)" for name, seconds in taken.items() if name != "ours")
    return f"{loss:9} {pass_:15} {size:7,} rows: ours {1e3 * ours:.3g} ms  {others}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of forward + backward, and memory, against the number of rows, log-log, every peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(PEERS), figsize=(5 * len(PEERS), 7), squeeze=False)
    for column, loss in enumerate(PEERS):
        mine = [row for row in rows if row["loss"] == loss and row["pass"] == "backward"]
        for name in dict.fromkeys(row["peer"] for row in mine):
            for axis, field, unit in ((axes[0][column], "seconds", 1e-3), (axes[1][column], "peak_bytes", 2**20)):
                points = [(row["rows"], row[field] / unit) for row in mine if row["peer"] == name and row.get(field)]
                axis.loglog(*zip(*points, strict=True), marker="o", label=name) if points else None
        axes[0][column].set(title=f"{loss}, forward + backward, D = {FEATURES}", ylabel="ms")
        axes[1][column].set(xlabel="rows (pairs)", ylabel="peak MiB above the inputs")
        axes[0][column].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of each operand")
    parser.add_argument("--memory-sizes", type=int, nargs="+", help="those at which memory is measured too")
    parser.add_argument("--seconds", type=float, default=10, help="time of each comparison")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    parser.add_argument("--measure-memory", nargs=4, metavar=("LOSS", "PEER", "PASS", "SIZE"), help="used by this program itself")
    arguments = parser.parse_args()
    if arguments.measure_memory:
        measure_memory(*arguments.measure_memory)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = arguments.sizes or ([256, 1024, 4096, 16384, 32768, 131072] if device == "cuda" else [256, 512, 1024, 2048, 4096])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    chosen, why = implementation_for(torch.empty(1, 1, device=device, dtype=dtype))
    print(f"{device}, {dtype}: {chosen} ({why}), {torch.get_num_threads()} threads")
    rows = measure(sizes, device, dtype, arguments.seconds, arguments.memory_sizes or sizes)
    settings = {"device": device, "dtype": str(dtype), "implementation": chosen, "features": FEATURES, "temperature": TEMPERATURE}
    path = results.write("kernels", settings | {"rows": rows}, arguments.out)
    plot(rows, path.with_suffix(".png"))
    print(json.dumps(settings), path, path.with_suffix(".png"), sep="\n")


if __name__ == "__main__":
    main()
