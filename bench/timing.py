"""Timing that survives a shared machine: contenders take turns, every sample is kept, ratios are taken round
by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Value = TypeVar("Value")
Samples = dict[str, list[float]]


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> Callable[[], float]:
    """The process's own time on one CPU thread, so that a busy machine's other processes do not count; else
    the wall clock.
    """
    return (
        time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time
    )


def timed(taken: dict[str, float], name: str, work: Callable[[], Value]) -> Value:
    """`work()`, and its seconds under `name`."""
    wait()
    started = time.perf_counter()
    value = work()
    wait()
    taken[name] = time.perf_counter() - started
    return value


def in_turns(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, budget: float, warm_up: int = 2
) -> Samples:
    """Seconds of every call, after `warm_up` calls of each: up to `rounds` rounds, at least three, until
    `budget` seconds are spent.

    >>> samples = in_turns({"nothing": lambda: None}, rounds=3, budget=1.0)
    >>> len(samples["nothing"])
    3
    """
    for work in contenders.values():
        for _ in range(warm_up):
            work()
    samples: Samples = {name: [] for name in contenders}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > budget:
            break
        for name, work in contenders.items():
            taken: dict[str, float] = {}
            timed(taken, name, work)
            samples[name].append(taken[name])
    return samples


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of own / other: what a round's noise does to both cancels.

    >>> ratio([2.0, 4.0, 60.0], [1.0, 2.0, 30.0])
    2.0
    """
    return statistics.median(first / second for first, second in zip(own, other, strict=True))
