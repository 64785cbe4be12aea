"""The similarity losses on a GPU against their targets, the floors that the device sets, and peers.

A floor is the larger of two times: matmul units of 2·M·N·D operations at the bf16 rate measured in the same run, and passes of M·N
exponentials at the measured rate. Units of a pass: forward 1, backward 4 (2 where queries are keys), both orders of σ and of the double
backward as each target says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench.peers import installed
from bench.stages import Conditions, ceilings
from bench.timing import in_turns, ratio, wait
from fastgessl.kernels import clip_loss, info_nce, nt_xent, sigma_kl

TEMPERATURE = 0.1
Work = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """One line of the table of targets: M = N = `rows`."""

    name: str
    rows: int
    width: int
    units: float
    passes: float
    """Exponential passes over the table."""
    goal: float
    """Seconds on one H200; 0 where the goal is a ratio to a peer."""
    make: Callable[[Tensor, Tensor], dict[str, Work]]
    """(query, key) -> ours first, then peers."""


def rows(conditions: Conditions) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row a target; the device's rates come first."""
    rates: dict[str, float] = {}
    for name, row in ceilings(Conditions(conditions.deadline, conditions.dry_run, None, None, None)):
        rates[name] = row["rate"]
    yield "rates", rates
    for target in TARGETS:
        if conditions.left <= 0:
            return
        size = min(target.rows, 64) if conditions.dry_run else target.rows
        yield target.name, _measured(target, size, rates, 0.0 if conditions.dry_run else min(conditions.left, 20.0))


def _measured(target: Target, size: int, rates: dict[str, float], budget: float) -> dict[str, Any]:
    query, key = _operands(size, target.width)
    contenders, found = target.make(query, key), {}
    for name, work in list(contenders.items()):
        outcome = _peak(work)
        found[name] = outcome
        if "absent" in outcome:
            del contenders[name]
    if OURS not in contenders:
        return {"rows": size, "contenders": found}
    samples = in_turns(contenders, rounds=50, budget=budget)
    for name, taken in samples.items():
        found[name] |= {"seconds": statistics.median(taken), "ratio_to_ours": ratio(taken, samples[OURS]), "samples": taken}
    operations = target.units * 2 * size**2 * target.width
    floor = max(operations / rates["matmul_bf16_tflops"] / 1e12, target.passes * size**2 / rates["exp_per_second"])
    seconds = found[OURS]["seconds"]
    return {
        "rows": size,
        "width": target.width,
        "seconds": seconds,
        "tflops": operations / seconds / 1e12,
        "floor_seconds": floor,
        "share_of_floor_rate": floor / seconds,
        "goal_seconds": target.goal,
        "met": seconds <= target.goal if target.goal and size == target.rows else None,
        "contenders": found,
    }


def _peak(work: Work) -> dict[str, Any]:
    """Peak bytes above what is held, or why the contender is absent: it does not fit."""
    if not torch.cuda.is_available():
        work()
        return {"peak_bytes": None}
    wait()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"absent": "out of memory"}
    wait()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - held}


def _operands(size: int, width: int) -> tuple[Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(size)
    key = normalize(torch.randn(size, width, generator=generator, device=device), dim=1)
    query = normalize(key + 1.5 * normalize(torch.randn(size, width, generator=generator, device=device), dim=1), dim=1)
    return query.bfloat16().requires_grad_(), key.bfloat16().requires_grad_()


def _backward(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Work:
    return lambda: torch.autograd.grad(loss(query, key), (query, key))


def _twice(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Work:
    def work() -> object:
        first = torch.autograd.grad(loss(query, key), (query, key), create_graph=True)
        return torch.autograd.grad(torch.stack([(gradient.float() ** 2).sum() for gradient in first]).sum(), (query, key))

    return work


def _dense_info_nce(query: Tensor, key: Tensor) -> Tensor:
    return cross_entropy((query @ key.T).float() / TEMPERATURE, torch.arange(len(query), device=query.device))


def _dense_clip(query: Tensor, key: Tensor) -> Tensor:
    return (_dense_info_nce(query, key) + _dense_info_nce(key, query)) / 2


def _dense_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    every = normalize(torch.cat([first, second]), dim=1)
    index = torch.arange(len(every), device=every.device)
    table = ((every @ every.T).float() / TEMPERATURE).masked_fill(index[:, None] == index, -torch.inf)
    return cross_entropy(table, index.roll(len(first)))


def _inf_cl(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(query, key, scale=1 / TEMPERATURE).mean()


OURS = "ours"


def _ours_info_nce(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key, temperature=TEMPERATURE)


def _ours_clip(query: Tensor, key: Tensor) -> Tensor:
    return clip_loss(query, key, temperature=TEMPERATURE)


def _ours_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    return nt_xent(first, second, temperature=TEMPERATURE)


def _with_peers(own: Callable[[Tensor, Tensor], Tensor], dense: Callable[[Tensor, Tensor], Tensor], *, inf_cl: bool = False) -> Any:
    """Ours, the dense loss, torch.compile of it (on a GPU), and Inf-CL where it is installed, forward and backward."""

    def make(query: Tensor, key: Tensor) -> dict[str, Work]:
        made = {OURS: _backward(own, query, key), "dense": _backward(dense, query, key)}
        if torch.cuda.is_available():
            made["torch.compile of dense"] = _backward(torch.compile(dense), query, key)
        if inf_cl and torch.cuda.is_available() and installed("inf_cl"):
            made["inf-cl"] = _backward(_inf_cl, query, key)
        return made

    return make


def _halves(make: Any) -> Any:
    """NT-Xent's rows are those of two views."""
    return lambda query, key: make(query[: len(query) // 2], key[: len(key) // 2])


def _sigma(query: Tensor, key: Tensor) -> dict[str, Work]:
    teacher = (query.detach().roll(1, 0), key.detach())
    return {OURS: _backward(lambda q, k: sigma_kl(q, k, *teacher, temperature=TEMPERATURE), query, key)}


INFO_NCE = _with_peers(_ours_info_nce, _dense_info_nce, inf_cl=True)
NT_XENT = _halves(_with_peers(_ours_nt_xent, _dense_nt_xent))
TARGETS = (
    Target("NT-Xent 32,768", 32768, 128, 3, 2, 2.0e-3, NT_XENT),
    Target("InfoNCE symmetric 32,768", 32768, 128, 5, 3, 3.4e-3, _with_peers(_ours_clip, _dense_clip)),
    Target("σ-KL 32,768, student", 32768, 128, 8, 5, 5.6e-3, _sigma),
    Target("double backward 32,768", 32768, 128, 13, 4, 9.0e-3, lambda q, k: {OURS: _twice(_ours_info_nce, q, k)}),
    Target("InfoNCE 131,072 D 256", 131072, 256, 5, 2, 110e-3, lambda q, k: {OURS: _backward(_ours_info_nce, q, k)}),
    *(Target(f"InfoNCE {n:,}", n, 128, 5, 2, 0.0, INFO_NCE) for n in (256, 1024, 4096, 32768)),
    *(Target(f"NT-Xent {n:,}", n, 128, 3, 2, 0.0, NT_XENT) for n in (512, 1024, 4096)),
    Target("InfoNCE 1,048,576", 1 << 20, 128, 5, 2, 3.6, lambda q, k: {OURS: _backward(_ours_info_nce, q, k)}),
)  # fmt: skip
