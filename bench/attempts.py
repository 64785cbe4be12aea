"""What becomes of a contender that fails: a row that says so, and a device that is ready for the next one."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

Row = dict[str, Any]
ANYTHING = (Exception,)
"""For peers: whatever they raise is their affair."""
NO_ROOM = (torch.OutOfMemoryError,)
"""For our own where the case may be too large for a card."""
NO_TIME: Row = {"absent": "no time was left"}


def attempt(work: Callable[[], Row], forgiven: tuple[type[Exception], ...] = ()) -> Row:
    """The row that `work` finds; {"absent": why} if it raises what is forgiven, else {"error": traceback},
    with which a stage has failed.

    Raises RuntimeError, with that row in it, if the device does not answer afterwards: after an illegal
    access nothing else can be measured in this process.

    >>> attempt(lambda: {"seconds": 1 / 0}, ANYTHING)
    {'absent': "ZeroDivisionError('division by zero')"}
    """
    try:
        return work()
    except forgiven as error:
        row = {"absent": repr(error)[:1000]}
    except Exception:
        row = {"error": traceback.format_exc()[-4000:]}
    # Only here have the failed frames, and with them their tensors, let go.
    gc.collect()
    lost = device_error()
    if lost:
        raise RuntimeError(f"the device answers no more after {row}") from lost
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def device_error() -> RuntimeError | None:
    """What the device says instead of answering, for the rest of this process, after a kernel has done
    something illegal; None on a CPU.
    """
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return error
    return None


def failures(rows: Mapping[str, Any]) -> list[str]:
    """Names of what failed in a stage's rows: an `error`, or an `exit_code` other than 0. What is absent has
    not failed.

    >>> failures({"case": {"rows": {"ours": {"error": "..."}, "peer": {"absent": "..."}}}, "pytest": {"exit_code": None}})
    ['case, rows, ours', 'pytest']
    """
    found = []
    for name, row in rows.items():
        if isinstance(row, Mapping):
            failed = row["exit_code"] != 0 if "exit_code" in row else "error" in row
            found += [name] if failed else [f"{name}, {inner}" for inner in failures(row)]
    return found
