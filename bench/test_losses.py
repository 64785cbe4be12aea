"""How do the similarity losses compare with dense PyTorch, other packages, and what the machine can do?

D = 128, temperature 0.1; bfloat16 operands on a GPU, float32 on a CPU. Work is the least that any way of
computing needs, with the table stored for nothing: a matmul unit is 2·M·N·D operations. The floor of a pass
is the larger of its operations and its exponentials at the rates measured in the same run.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from bench.results import ROOT
from fastgessl.kernels import NTXentLoss, clip_loss, info_nce, nt_xent, sigma_kl

FEATURES, TEMPERATURE = 128, 0.1
Loss = Callable[[Tensor, Tensor], Tensor]
OURS = "ours"
PASSES = ("forward", "backward", "double backward")


def dense_info_nce(query: Tensor, key: Tensor) -> Tensor:
    """The three lines that people write."""
    table = (query @ key.T).float() / TEMPERATURE
    return F.cross_entropy(table, torch.arange(len(query), device=query.device))


def dense_clip(image: Tensor, text: Tensor) -> Tensor:
    table, index = (image @ text.T).float() / TEMPERATURE, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(table, index) + F.cross_entropy(table.T, index)) / 2


def dense_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([first, second]), dim=1)
    index = torch.arange(len(rows), device=rows.device)
    table = ((rows @ rows.T).float() / TEMPERATURE).masked_fill(index[:, None] == index, -torch.inf)
    return F.cross_entropy(table, index.roll(len(first)))


def sigma(query: Tensor, key: Tensor) -> Tensor:
    return sigma_kl(query, key, query.detach().roll(1, 0), key.detach(), temperature=TEMPERATURE)


def dense_sigma(query: Tensor, key: Tensor) -> Tensor:
    student, teacher = (
        ((rows @ keys.T).float() / TEMPERATURE).log_softmax(1)
        for rows, keys in ((query, key), (query.detach().roll(1, 0), key.detach()))
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def autocast(criterion: Callable[[], torch.nn.Module]) -> Loss:
    """Whatever NTXentLoss a script imports, behind a linear projector, under autocast to bfloat16."""

    def loss(first: Tensor, second: Tensor) -> Tensor:
        projector = torch.eye(FEATURES, device=first.device)
        with torch.autocast(first.device.type, dtype=torch.bfloat16):
            return criterion()(first.float() @ projector, second.float() @ projector)

    return loss


def lightly() -> torch.nn.Module:
    from lightly.loss import NTXentLoss as Lightlys

    return Lightlys(temperature=TEMPERATURE)


def inf_cl(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(query, key, scale=1 / TEMPERATURE, head_dim=query.shape[1]).mean()


def cut_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(query / TEMPERATURE, key, torch.arange(len(query), device=query.device))


def beside_dense(loss: Callable[..., Tensor], dense: Loss) -> dict[str, Loss]:
    compiled = torch.compile(dense, dynamic=False)
    return {OURS: partial(loss, temperature=TEMPERATURE), "dense": dense, "torch.compile": compiled}


CONTENDERS: dict[str, dict[str, Loss]] = {
    "info_nce": beside_dense(info_nce, dense_info_nce) | {"cut-cross-entropy": cut_cross_entropy},
    # Inf-CL computes in float32 whatever it is given, so it has a comparison in that precision.
    "info_nce float32": {OURS: partial(info_nce, temperature=TEMPERATURE), "inf-cl": inf_cl},
    "nt_xent": beside_dense(nt_xent, dense_nt_xent)
    | {"lightly": lambda first, second: lightly()(first, second)},
    "nt_xent autocast": {
        OURS: autocast(partial(NTXentLoss, temperature=TEMPERATURE)),
        "lightly": autocast(lightly),
    },
    "clip": beside_dense(clip_loss, dense_clip),
    "sigma_kl": {OURS: sigma, "dense": dense_sigma},
}
MATMULS = {"info_nce": (1, 3, 9), "nt_xent": (0.5, 1.5, 4.5), "clip": (1, 3, 9), "sigma_kl": (2, 5, 15)}
"""Matmul units of the three passes; NT-Xent's table is symmetric."""
EXPONENTIALS = {"info_nce": 1, "nt_xent": 0.5, "clip": 2, "sigma_kl": 2}
GOALS = {
    ("nt_xent", "backward", 16_384): 2.0e-3,
    ("clip", "backward", 32_768): 3.4e-3,
    ("sigma_kl", "backward", 32_768): 5.6e-3,
    ("info_nce", "double backward", 32_768): 9.0e-3,
    ("info_nce", "backward", 1 << 20): 3.6,
}
"""Seconds on one H200."""
PACKAGES = {"lightly": "lightly", "inf-cl": "inf_cl", "cut-cross-entropy": "cut_cross_entropy"}
GPU_ONLY = ("inf-cl", "cut-cross-entropy")
TABLES = {"dense": 5, "lightly": 8, "torch.compile": 4}
"""About how many (M, N) arrays a backward of the contender holds at once."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rows" in metafunc.fixturenames:
        cuda = torch.cuda.is_available()
        everywhere = [256, 1024, 4096, 16_384, 32_768] if cuda else [256, 512, 1024, 2048, 4096]
        # Tables that a dense loss cannot hold: the backward alone.
        sizes = everywhere + ([131_072, 1 << 20] if cuda else [16_384, 65_536])
        sizes = [16] if metafunc.config.getoption("tiny") else sizes
        passes = {size: ("backward",) if size > max(everywhere) else PASSES for size in sizes}
        metafunc.parametrize("pass_, rows", [(pass_, size) for size in sizes for pass_ in passes[size]])


@pytest.mark.parametrize("name", CONTENDERS)
def test_loss(name: str, pass_: str, rows: int, contend: Any, keep: Any, device: str) -> None:
    loss, _, said = name.partition(" ")
    dtype = torch.bfloat16 if device == "cuda" and said != "float32" else torch.float32
    entries = (rows * (2 if loss == "nt_xent" else 1)) ** 2
    operands = pair(rows, device, dtype)
    contenders = {
        other: obstacle(other, pass_, rows, entries, device) or partial(one_pass, pass_, function, *operands)
        for other, function in CONTENDERS[name].items()
    }
    case = {"loss": name, "pass": pass_, "size": rows, "dtype": str(dtype).removeprefix("torch.")}
    found = contend(case, contenders)
    operations = MATMULS[loss][PASSES.index(pass_)] * 2 * entries * FEATURES
    best = rates(device, torch.bfloat16 if said == "autocast" else dtype)
    floor = max(operations / best["operations"], EXPONENTIALS[loss] * entries / best["exponentials"])
    for row in found.values():
        if "seconds" in row:
            row["tflops"] = operations / row["best_seconds"] / 1e12
            row["fraction_of_floor_rate"] = floor / row["best_seconds"]
    if device == "cuda" and (name, pass_, rows) in GOALS:
        found[OURS]["goal_seconds"] = GOALS[name, pass_, rows]
    keep(case, found)


def pair(rows: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query and key (rows, D) of unit length, each query near its key."""
    generator = torch.Generator(device).manual_seed(rows)
    key, noise = (
        F.normalize(torch.randn(rows, FEATURES, generator=generator, device=device), dim=1) for _ in range(2)
    )
    query = F.normalize(key + 1.5 * noise, dim=1)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def one_pass(pass_: str, loss: Loss, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """The loss, its gradients, or the gradients of their squared norm."""
    if pass_ == "forward":
        with torch.no_grad():
            return (loss(query, key),)
    first = torch.autograd.grad(loss(query, key), (query, key), create_graph=pass_ == "double backward")
    if pass_ == "backward":
        return first
    return torch.autograd.grad(sum(slope.float().square().sum() for slope in first), (query, key))


def obstacle(name: str, pass_: str, rows: int, entries: int, device: str) -> str | None:
    """Why a contender is not measured, which its row then says; None if it is."""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        return f"{name} is not installed"
    if name in GPU_ONLY and device != "cuda":
        return f"{name} needs a GPU"
    if pass_ == "double backward" and name in (*GPU_ONLY, "torch.compile"):
        return f"{name} has no second derivative"
    if name == "torch.compile" and device == "cpu" and rows != 1024:
        return "compiling takes a minute for each size: at 1,024 rows only"
    if name == OURS and device == "cpu" and entries > 2**32:
        return "minutes for each call"
    needed = TABLES.get(name, 0) * 4 * entries
    available = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    return f"its tables need about {needed / 2**30:.0f} GiB" if needed > available / 2 else None


@cache
def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations and exponentials per second at best: of a large matmul, and of exp over an array."""
    side, count = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 20)
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    source, target = torch.randn(2, count, device=device)
    work = {
        "operations": (2 * side**3, lambda: left @ right),
        "exponentials": (count, lambda: torch.exp2(source, out=target)),
    }
    found = {}
    for name, (amount, call) in work.items():
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        found[name] = amount / timer.blocked_autorange(min_run_time=0.2).median
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks(ranks: int, benchmark: Any, keep: Any, device: str, tiny: bool, tmp_path: Path) -> None:
    """What do several processes cost? One GPU measures NCCL at world size 1."""
    if ranks > (torch.cuda.device_count() if device == "cuda" else 2) or (tiny and ranks != 2):
        pytest.skip(f"{ranks} ranks are not measured here")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    program = ["-m", "bench.ranks", str(tmp_path / "rows.json"), *(["--tiny"] if tiny else [])]
    benchmark.pedantic(subprocess.run, args=(launch + program,), kwargs={"check": True, "cwd": ROOT})
    keep({"what": "collectives", "ranks": ranks}, json.loads((tmp_path / "rows.json").read_text()))
