"""Peers may fail, ours may not, and neither takes the others along."""

from __future__ import annotations

import pytest
import torch

from bench import attempts
from bench.attempts import ANYTHING, NO_ROOM, attempt, failures


def raising(error):
    def work():
        raise error

    return work


def test_what_is_forgiven_is_absent_and_what_is_not_is_an_error_with_its_traceback():
    no_room = torch.OutOfMemoryError("tried to allocate 20 GiB")
    assert attempt(raising(no_room), NO_ROOM) == {"absent": "OutOfMemoryError('tried to allocate 20 GiB')"}
    assert attempt(raising(TypeError("head_dim")), ANYTHING) == {"absent": "TypeError('head_dim')"}
    assert "in work" in attempt(raising(TypeError("head_dim")), NO_ROOM)["error"]
    assert "OutOfMemoryError" in attempt(raising(no_room))["error"]
    with pytest.raises(KeyboardInterrupt):
        attempt(raising(KeyboardInterrupt()), ANYTHING)


def test_a_failed_contender_s_tensors_are_gone_before_the_next_one_starts():
    freed = []

    class Held:
        def __init__(self):
            self.in_a_cycle = self

        def __del__(self):
            freed.append(True)

    def work():
        held = Held()
        raise RuntimeError(held)

    attempt(work, ANYTHING)
    assert freed


def test_a_device_that_answers_no_more_ends_the_stage_and_names_who_did_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "synchronize",
        raising(RuntimeError("CUDA error: an illegal memory access was encountered")),
    )
    with pytest.raises(RuntimeError, match=r"answers no more after .*the kernel of a peer"):
        attempt(raising(ValueError("the kernel of a peer")), ANYTHING)


def test_errors_and_exit_codes_count_as_failures_and_absent_rows_do_not():
    rows = {
        "rates": {"matmul": 790.0},
        "case": {
            "rows": {
                "ours": {"seconds": 1.0},
                "GeSSL": {"error": "Traceback"},
                "peer": {"absent": "not installed"},
            }
        },
        "pytest": {"exit_code": 1, "said": {}},
        "cut": {"exit_code": None},
        "well": {"exit_code": 0, "error": "a warning on stderr"},
    }
    assert failures(rows) == ["case, rows, GeSSL", "pytest", "cut"]
    assert attempts.failures({}) == []
