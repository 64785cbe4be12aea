"""What moved between two results files: `python -m bench.compare OLD.json NEW.json [--least 0.03]`.

Everything with `samples` (seconds) at the same place in both files is compared: the ratio of medians with a
99 % bootstrap interval. A line moved if the interval leaves out 1 and the ratio is at least `--least` away
from it. Exit code 1 if something became slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DRAWS = 4000


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=float, default=0.03, help="smallest change worth a line, as a share")
    arguments = parser.parse_args(argv)
    old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
    moved = list(changes(old, new, arguments.least))
    for key in ("processor", "gpus", "versions", "threads"):
        if old.get(key) != new.get(key):
            print(f"note: {key} differs: {old.get(key)} | {new.get(key)}")
    table = Table(
        title=f"{old.get('commit')} -> {new.get('commit')}: what moved beyond noise (99 %) and "
        f"{arguments.least:.0%}"
    )
    for column in ("measurement", "old, ms", "new, ms", "new / old", "99 %"):
        table.add_column(column)
    for place, before, after, ratio, low, high in moved:
        table.add_row(
            place, f"{1000 * before:.3f}", f"{1000 * after:.3f}", f"{ratio:.3f}", f"[{low:.3f}, {high:.3f}]"
        )
    Console().print(table if moved else "nothing moved beyond noise")
    sys.exit(int(any(ratio > 1 for _, _, _, ratio, _, _ in moved)))


def changes(old: Any, new: Any, least: float) -> Iterator[tuple[str, float, float, float, float, float]]:
    """(place, old median, new median, ratio, low, high) of all that moved, the largest slow-down first."""
    before, after = dict(samples_of(old)), dict(samples_of(new))
    found = []
    for place in before.keys() & after.keys():
        first, second = float(np.median(before[place])), float(np.median(after[place]))
        low, high = interval(before[place], after[place])
        if not low <= 1 <= high and abs(second / first - 1) >= least:
            found.append((place, first, second, second / first, low, high))
    yield from sorted(found, key=lambda change: -change[3])


def interval(old: Sequence[float], new: Sequence[float], level: float = 0.99) -> tuple[float, float]:
    """Bootstrap interval of median(new) / median(old).

    >>> low, high = interval([1.0, 1.1, 0.9, 1.0, 1.05], [2.0, 2.1, 1.9, 2.0, 2.05])
    >>> 1.6 < low < 2.0 < high < 2.4
    True
    """
    generator = np.random.default_rng(0)
    medians = [
        np.median(generator.choice(values, (DRAWS, len(values))), axis=1)
        for values in (np.asarray(old), np.asarray(new))
    ]
    low, high = np.quantile(medians[1] / medians[0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def samples_of(tree: Any, place: str = "") -> Iterator[tuple[str, list[float]]]:
    """Every list of samples, with the names that lead to it; rows of a list go by what names them rather than
    by their number.

    >>> dict(samples_of({"rows": [{"loss": "a", "size": 2, "samples": [1.0]}]}))
    {'rows / a 2': [1.0]}
    """
    if isinstance(tree, dict):
        if isinstance(tree.get("samples"), list):
            yield place, tree["samples"]
        for key, value in tree.items():
            if key != "samples":
                yield from samples_of(value, f"{place} / {key}" if place else str(key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from samples_of(value, f"{place} / {_named(value, number)}")


def _named(row: Any, number: int) -> str:
    words = (
        [value for value in row.values() if isinstance(value, str | int) and not isinstance(value, bool)]
        if isinstance(row, dict)
        else []
    )
    return " ".join(str(word) for word in words) or str(number)


if __name__ == "__main__":
    main()
