"""On which methods a test of the objective runs: on all of them once, and on one of each kind through every
option.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

from fastgessl.methods import METHODS

ALL = [name for name in sorted(METHODS) if not METHODS[name].needs_labels]
# A momentum encoder's targets; negatives that ranks exchange; prototypes, a queue, and targets that follow
# from the outputs.
KINDS = ("byol", "simclr", "swav")


def cases(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """(method, option, ...): every combination for one method of each kind, and the first one for every other
    method.

    >>> [case for case in cases(["exact", "fast"]) if case[0] in ("moco", "swav")]
    [('moco', 'exact'), ('swav', 'exact'), ('swav', 'fast')]
    """
    first = tuple(values[0] for values in options)
    return [(name, *case) for name in ALL for case in (product(*options) if name in KINDS else [first])]
