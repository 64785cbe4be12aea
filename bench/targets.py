"""The similarity losses on a GPU against their targets, the floors that the device sets, and peers.

A floor is the larger of two times: matmul units of 2·M·N·D operations at the bf16 rate measured in the same
run, and passes of M·N exponentials at the measured rate. Units of a pass: forward 1, backward 4 (2 where
queries are keys), both orders of σ and of the double backward as each target says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench.attempts import ANYTHING, NO_TIME, attempt
from bench.stages import Conditions, ceilings
from bench.timing import in_turns, ratio, wait
from fastgessl.kernels import clip_loss, info_nce, nt_xent, sigma_kl

TEMPERATURE = 0.1
OURS, OURS_FLOAT32 = "ours", "ours, float32"
Work = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """Somebody's way to compute a target, and in what."""

    work: Work
    precision: str = "bf16 operands, float32 sums"
    beside: str = OURS
    """Whom it takes turns with: a ratio of two precisions would say nothing about programs."""


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
    make: Callable[[Tensor, Tensor], dict[str, Contender]]
    """(query, key) -> ours first, then ours in float32 where a peer needs it, then peers."""


def rows(conditions: Conditions) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row a target, anew with each contender; the device's rates come first."""
    rates: dict[str, float] = {}
    for name, row in ceilings(Conditions(conditions.deadline, conditions.dry_run, None, None, None)):
        rates[name] = row["rate"]
    yield "rates", rates
    for target in TARGETS:
        if conditions.left <= 0:
            yield target.name, NO_TIME
            continue
        size = min(target.rows, 64) if conditions.dry_run else target.rows
        for so_far in _measurements(
            target, size, rates, 0.0 if conditions.dry_run else min(conditions.left, 20.0)
        ):
            yield target.name, so_far


def _measurements(
    target: Target, size: int, rates: dict[str, float], budget: float
) -> Iterator[dict[str, Any]]:
    """The target's row, with one contender more each time: what a peer does to the device must not cost our
    own numbers.
    """
    # Code that torch has compiled for another size it compiles for any size the second time, and no peer is
    # at its best then.
    torch._dynamo.reset()
    contenders = target.make(*_operands(size, target.width))
    found: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        described = {"precision": contender.precision, "beside": contender.beside}
        if name == OURS or "seconds" in found[contender.beside]:
            turns = {contender.beside: contenders[contender.beside].work} | {name: contender.work}
            work = partial(_outcome, turns, name, budget / len(contenders))
            found[name] = described | attempt(work, () if name in (OURS, OURS_FLOAT32) else ANYTHING)
        else:
            found[name] = described | {"absent": f"there is nothing of {contender.beside} to compare with"}
        yield _row(target, size, rates, found[OURS].get("seconds")) | {"contenders": dict(found)}


def _row(target: Target, size: int, rates: dict[str, float], seconds: float | None) -> dict[str, Any]:
    """Our seconds beside floor and goal; None where there are none."""
    operations = target.units * 2 * size**2 * target.width
    floor = max(
        operations / rates["matmul_bf16_tflops"] / 1e12, target.passes * size**2 / rates["exp_per_second"]
    )
    return {
        "rows": size,
        "width": target.width,
        "seconds": seconds,
        "tflops": seconds and operations / seconds / 1e12,
        "floor_seconds": floor,
        "share_of_floor_rate": seconds and floor / seconds,
        "goal_seconds": target.goal,
        "met": seconds <= target.goal if seconds and target.goal and size == target.rows else None,
    }


def _outcome(turns: dict[str, Work], name: str, budget: float) -> dict[str, Any]:
    """Seconds of `name`, and their ratio to those of the first of `turns`."""
    peak = _peak(turns[name])
    samples = in_turns(turns, rounds=50, budget=budget)
    taken, ours = samples[name], next(iter(samples.values()))
    return {
        "peak_bytes": peak,
        "seconds": statistics.median(taken),
        "ratio_to_ours": ratio(taken, ours),
        "samples": taken,
    }


def _peak(work: Work) -> int | None:
    """Most bytes beyond those that are held; the first call does not count, because it compiles."""
    work()
    if not torch.cuda.is_available():
        return None
    wait()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return torch.cuda.max_memory_allocated() - held


def _operands(size: int, width: int) -> tuple[Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(size)
    key = normalize(torch.randn(size, width, generator=generator, device=device), dim=1)
    query = normalize(
        key + 1.5 * normalize(torch.randn(size, width, generator=generator, device=device), dim=1), dim=1
    )
    return query.bfloat16().requires_grad_(), key.bfloat16().requires_grad_()


def _backward(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Work:
    return lambda: torch.autograd.grad(loss(query, key), (query, key))


def _twice(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Work:
    def work() -> object:
        first = torch.autograd.grad(loss(query, key), (query, key), create_graph=True)
        return torch.autograd.grad(
            torch.stack([(gradient.float() ** 2).sum() for gradient in first]).sum(), (query, key)
        )

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

    return cal_flash_loss(query, key, scale=1 / TEMPERATURE, head_dim=query.shape[1]).mean()


def _ours_info_nce(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key, temperature=TEMPERATURE)


def _ours_clip(query: Tensor, key: Tensor) -> Tensor:
    return clip_loss(query, key, temperature=TEMPERATURE)


def _ours_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    return nt_xent(first, second, temperature=TEMPERATURE)


def _ours_only(work: Callable[[Tensor, Tensor], Work]) -> Any:
    return lambda query, key: {OURS: Contender(work(query, key))}


def _with_peers(
    own: Callable[[Tensor, Tensor], Tensor],
    dense: Callable[[Tensor, Tensor], Tensor],
    *,
    inf_cl: bool = False,
) -> Any:
    """Ours, the dense loss, torch.compile of it (on a GPU), and Inf-CL beside ours in float32, forward and
    backward.
    """

    def make(query: Tensor, key: Tensor) -> dict[str, Contender]:
        stored = "bf16 products, float32 table"
        made = {
            OURS: Contender(_backward(own, query, key)),
            "dense": Contender(_backward(dense, query, key), stored),
        }
        if torch.cuda.is_available():
            compiled = torch.compile(dense, dynamic=False)
            made["torch.compile of dense"] = Contender(_backward(compiled, query, key), stored)
        if inf_cl:
            # Inf-CL turns whatever it is given into float32.
            wide = [operand.detach().float().requires_grad_() for operand in (query, key)]
            made[OURS_FLOAT32] = Contender(_backward(own, *wide), "float32 operands, three TF32 products")
            made["inf-cl"] = Contender(
                _backward(_inf_cl, *wide), "float32 operands, TF32 products", beside=OURS_FLOAT32
            )
        return made

    return make


def _halves(make: Any) -> Any:
    """NT-Xent's rows are those of two views."""
    return lambda query, key: make(query[: len(query) // 2], key[: len(key) // 2])


def _sigma(query: Tensor, key: Tensor) -> Work:
    teacher = (query.detach().roll(1, 0), key.detach())
    return _backward(lambda q, k: sigma_kl(q, k, *teacher, temperature=TEMPERATURE), query, key)


INFO_NCE = _with_peers(_ours_info_nce, _dense_info_nce, inf_cl=True)
NT_XENT = _halves(_with_peers(_ours_nt_xent, _dense_nt_xent))
ONE_DIRECTION = _ours_only(partial(_backward, _ours_info_nce))
TARGETS = (
    Target("NT-Xent 32,768", 32768, 128, 3, 2, 2.0e-3, NT_XENT),
    Target("InfoNCE symmetric 32,768", 32768, 128, 5, 3, 3.4e-3, _with_peers(_ours_clip, _dense_clip)),
    Target("σ-KL 32,768, student", 32768, 128, 8, 5, 5.6e-3, _ours_only(_sigma)),
    Target("double backward 32,768", 32768, 128, 13, 4, 9.0e-3, _ours_only(partial(_twice, _ours_info_nce))),
    Target("InfoNCE 131,072 D 256", 131072, 256, 5, 2, 110e-3, ONE_DIRECTION),
    *(Target(f"InfoNCE {n:,}", n, 128, 5, 2, 0.0, INFO_NCE) for n in (256, 1024, 4096, 32768)),
    *(Target(f"NT-Xent {n:,}", n, 128, 3, 2, 0.0, NT_XENT) for n in (512, 1024, 4096)),
    Target("InfoNCE 1,048,576", 1 << 20, 128, 5, 2, 3.6, ONE_DIRECTION),
)  # fmt: skip
