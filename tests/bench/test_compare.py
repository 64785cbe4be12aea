"""What moved between two results is told from noise."""

from __future__ import annotations

import json

import pytest

from bench import compare


def record(*seconds, commit="a"):
    return {"commit": commit, "rows": [{"loss": "nt_xent", "size": 256, "samples": list(seconds)}]}


NOISY = (1.0, 1.04, 0.97, 1.02, 0.98, 1.01, 0.99)


def test_noise_is_no_change():
    assert not list(compare.changes(record(*NOISY), record(*reversed(NOISY)), 0.03))


def test_a_slower_line_is_named_with_its_ratio():
    ((place, before, after, ratio, low, high),) = compare.changes(
        record(*NOISY), record(*(1.5 * value for value in NOISY)), 0.03
    )
    assert place == "rows / nt_xent 256" and (before, after) == (1.0, 1.5)
    assert low <= ratio <= high and ratio == pytest.approx(1.5)


def test_a_certain_but_tiny_change_is_left_out():
    assert not list(compare.changes(record(*[1.0] * 5), record(*[1.01] * 5), 0.03))
    assert list(compare.changes(record(*[1.0] * 5), record(*[1.01] * 5), 0.001))


def test_the_program_fails_where_something_became_slower_and_not_where_it_became_faster(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record(*NOISY)))
    new.write_text(json.dumps(record(*(2 * value for value in NOISY), commit="b")))
    with pytest.raises(SystemExit) as slower:
        compare.main([str(old), str(new)])
    with pytest.raises(SystemExit) as faster:
        compare.main([str(new), str(old)])
    assert (slower.value.code, faster.value.code) == (1, 0)
    assert "nt_xent 256" in capsys.readouterr().out
