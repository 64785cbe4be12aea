"""Let contenders take turns, and write what was measured after each of them.

`pytest bench --benchmark-only` measures everything with pytest-benchmark, on the GPU if there is one. Each
file asks a few questions; each case writes its row to bench/results/<machine>/<date>-<file>.json at once.
`--tiny` tries everything out in seconds.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import results
from bench.memory import device_peak_bytes

Row = dict[str, Any]
Work = Callable[[], object]
OTHERS = ("lightly", "stable-pretraining", "inf-cl", "cut-cross-entropy", "scikit-learn", "torch.compile")
"""Whose failures are their own affair: such a contender is absent. Ours may only lack memory."""
CASES = pytest.StashKey[dict[str, dict[str, Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--tiny", action="store_true", help="smallest sizes: does it run?")
    group.addoption("--seconds", type=float, default=5.0, help="about what the rounds of a case take")
    group.addoption("--out", type=Path, help="folder for the results, instead of bench/results")
    group.addoption("--photos", type=Path, help="a folder of photos, for the engines that decode files")
    group.addoption("--cifar10", type=Path, help="an .npz with CIFAR-10 in train_x, instead of noise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # On one CPU thread the process's own time: a busy machine's other processes do not count.
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    timer = time.process_time if alone else time.perf_counter
    for item in items:
        if not item.get_closest_marker("benchmark"):
            item.add_marker(pytest.mark.benchmark(timer=timer, disable_gc=True))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("tiny")


@pytest.fixture
def keep(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Row, Row], None]:
    """keep(case, rows): write what is known of a case by contender, in place of what was known before."""
    config, name = request.config, request.module.__name__.rpartition("test_")[2]

    def keep(case: Row, rows: Row) -> None:
        benchmark.extra_info |= {**case, "rows": rows}
        cases = config.stash.setdefault(CASES, {}).setdefault(name, {})
        cases[", ".join(str(value) for value in case.values())] = {**case, "rows": rows}
        results.write(name, {"tiny": config.getoption("tiny"), "cases": cases}, config.getoption("out"))

    return keep


@pytest.fixture
def contend(request: pytest.FixtureRequest, benchmark: Any, keep: Callable[[Row, Row], None]) -> Any:
    """contend(case, contenders, calls, counts): rows by contender, who run in turns; the first is ours.

    A contender is a function, or the reason why it is absent. `calls` says how many steps a call of a
    contender makes, where it is not one; `counts` how much a step does, which becomes rates.
    pytest-benchmark times ours; the others take their turn before each of its rounds. Rows hold median
    seconds, the ratio to ours (median over rounds), peak bytes and samples. What fails is a row "absent" or
    "error", after which the others go on; an error fails the case in the end.
    """
    tiny = request.config.getoption("tiny")
    budget = 0.0 if tiny else request.config.getoption("seconds")
    timer = request.node.get_closest_marker("benchmark").kwargs["timer"]

    def contend(
        case: Row,
        contenders: Mapping[str, Work | str],
        calls: Mapping[str, int] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> dict[str, Row]:
        # Else torch compiles for any size the second time, and no contender is at its best then.
        torch._dynamo.reset()
        rows: dict[str, Row] = {}
        for name, work in contenders.items():
            rows[name] = {"absent": work} if isinstance(work, str) else _first_calls(name, work, timer)
            keep(case, rows)
        running = {name: work for name, work in contenders.items() if "seconds" in rows[name]}
        ours = next(iter(contenders))
        if ours in running:
            turn = sum(rows[name]["seconds"] for name in running)
            rounds = 1 if turn > 10 * budget > 0 else max(3, min(200, round(budget / turn)))
            for name, samples in _turns(benchmark, running, rounds, timer).items():
                row = _statistics(samples, rows, (calls or {}).get(name, 1))
                rates = {rate: count / row["seconds"] for rate, count in (counts or {}).items()}
                rows[name] |= row | rates
            keep(case, rows)
        if errors := {name: row["error"] for name, row in rows.items() if "error" in row}:
            pytest.fail("\n".join(f"{name}: {error}" for name, error in errors.items()))
        if ours not in running:
            pytest.skip(rows[ours]["absent"])
        return rows

    return contend


def _first_calls(name: str, work: Work, timer: Callable[[], float]) -> Row:
    """Warm up, and measure memory: ours is written before a peer can do something to the device."""
    try:
        work()
        seconds: list[float] = []
        peak = device_peak_bytes(lambda: seconds.append(_seconds(work, timer)))
        return {"seconds": seconds[0], "peak_bytes": peak}
    except torch.OutOfMemoryError as error:
        row = {"absent": repr(error)[:500]}
    except Exception as error:
        row = {"absent": repr(error)[:500]} if name in OTHERS else {"error": traceback.format_exc()[-4000:]}
    # Only here have the failed frames, and with them their tensors, let go.
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            pytest.exit(f"the device answers no more after {name}, {row}: {lost}", returncode=1)
        torch.cuda.empty_cache()
    return row


def _turns(
    benchmark: Any, running: Mapping[str, Work], rounds: int, timer: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each contender's call, round by round; ours by pytest-benchmark, the others before it."""
    (ours, own), *others = running.items()
    samples: dict[str, list[float]] = {name: [] for name, _ in others}

    def others_take_their_turn() -> None:
        for name, work in others:
            samples[name].append(_seconds(work, timer))

    benchmark.pedantic(_waited, args=(own,), setup=others_take_their_turn, rounds=rounds)
    return {ours: list(benchmark.stats.stats.data), **samples}


def _statistics(samples: list[float], rows: dict[str, Row], calls: int) -> Row:
    own = [seconds / calls for seconds in samples]
    ours = next(iter(rows.values())).get("samples", own)
    return {
        "seconds": statistics.median(own),
        "best_seconds": min(own),
        "ratio_to_ours": statistics.median(one / other for one, other in zip(own, ours, strict=True)),
        "samples": own,
    }


def _seconds(work: Work, timer: Callable[[], float]) -> float:
    started = timer()
    _waited(work)
    return timer() - started


def _waited(work: Work) -> None:
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
