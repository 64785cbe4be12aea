"""Tuning: the search, what it refuses, the table it writes, and the losses that read it; kernels run in
Triton's interpreter.
"""

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastgessl.kernels.similarity import autotune, tuned_tiles
from fastgessl.kernels.similarity.tiles import (
    FLOAT32,
    INTERPRETED,
    KERNELS,
    TABLE,
    WITHOUT_TEACHER,
    Entry,
    Tile,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BEST = INTERPRETED._replace(rows=16)


def older(package, *release):
    return tuple(int(part) for part in version(package).split(".")[:2]) < release


def run(*command, **environment):
    surroundings = {name: value for name, value in os.environ.items() if name != tuned_tiles.ENVIRONMENT}
    surroundings |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], env=surroundings, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def interpreter():
    pytest.importorskip("triton")
    if older("triton", 3, 7) and not older("numpy", 2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")


@pytest.fixture(scope="module")
def tuned(interpreter, tmp_path_factory):
    """(table, what the program says) of a run that prefers a wrong tile and one that does not fit."""
    path = tmp_path_factory.mktemp("tuned") / "tiles.json"
    found = run(Path(__file__).with_name("tuning_program.py"), path)
    assert found.returncode == 0, found.stderr
    return path, json.loads(found.stdout.splitlines()[-1])


def distance(wanted):
    """A cost with one valley: steps between a tile and the best one."""
    return lambda tile: sum(
        abs(values.index(getattr(tile, name)) - values.index(getattr(wanted, name)))
        for name, values in autotune.STEPS.items()
    )


@pytest.mark.parametrize(
    "wanted", [Tile(128, 64, 8, 3, 128), Tile(16, 16, 2, 1, 16), Tile(64, 128, 4, 4, 256)]
)
def test_the_search_walks_down_to_the_cheapest_tile_and_tries_each_once(wanted):
    tried = []

    def cost(tile):
        tried.append(tile)
        return distance(wanted)(tile)

    costs = autotune.search(Tile(32, 32, 4, 2, 64), cost)
    assert min(costs, key=costs.__getitem__) == wanted
    assert len(tried) == len(set(tried))


def test_the_search_stays_where_nothing_near_is_cheaper():
    start = Tile(32, 32, 4, 2, 64)
    assert next(iter(autotune.search(start, lambda tile: 1.0))) == start
    assert len(autotune.search(start, lambda tile: 1.0)) == 1 + len(list(autotune.neighbours(start)))


def test_the_search_can_start_from_every_shipped_tile():
    for tile in {tile for tiles in (*TABLE.values(), *FLOAT32.values(), (INTERPRETED,)) for tile in tiles}:
        assert list(autotune.neighbours(tile))


def test_every_kernel_is_tuned_past_a_wrong_tile_and_one_without_room(tuned):
    path, said = tuned
    table = tuned_tiles.read(path, "interpreter")
    wanted = {Entry(kernel, 128, teacher, False) for kernel in KERNELS for teacher in (False, True)}
    assert set(table) == {
        entry for entry in wanted if not (entry.teacher and entry.kernel in WITHOUT_TEACHER)
    }
    assert set(table.values()) == {tuned_tiles.Measured(BEST, 2.0, 3.0)}
    # A measurement launches its own kernel and no other.
    assert sorted(said["launched"]) == sorted([kernel] for kernel in KERNELS)


def test_the_best_tiles_are_put_to_use_at_once(tuned):
    assert [Tile(*tile) for tile in tuned[1]["in_use"]] == [BEST]


def test_past_the_deadline_only_the_shipped_tile_is_measured(tuned):
    assert Tile(*tuned[1]["late"]) == INTERPRETED


def test_losses_read_the_table_and_give_the_same_numbers(tuned):
    path, _ = tuned
    code = (
        "import torch; from fastgessl.kernels import info_nce; from fastgessl.kernels.similarity import "
        "tuned_tiles; q = torch.eye(40, 16).requires_grad_()\n"
        "loss = info_nce(q.bfloat16(), q.bfloat16(), implementation='triton'); loss.backward()\n"
        "expected = info_nce(q, q, implementation='reference')\n"
        "torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)\n"
        "tiles = [tuned_tiles.tile_for('gradient_rows_kernel', part, 16, False) for part in (q.bfloat16(), "
        "q)]\n"
        "print(tuple(tiles[0]), tiles[1].rows)"
    )
    found = run("-c", code, **{tuned_tiles.ENVIRONMENT: str(path)})
    assert found.stdout.strip() == f"{tuple(BEST)} {INTERPRETED.rows}", found.stdout + found.stderr


def test_the_command_measures_and_keeps_what_a_table_already_holds(interpreter, tmp_path):
    entry = Entry("moments_kernel", 256, True, True)
    tuned_tiles.write(tmp_path / "tiles.json", "interpreter", {entry: tuned_tiles.Measured(BEST, 1.0, None)})
    options = (
        "--kernels",
        "statistics_kernel",
        "--features",
        16,
        "--rows",
        8,
        "--seconds",
        0.2,
        "--out",
        tmp_path / "tiles.json",
    )
    found = run("-m", "fastgessl.kernels.similarity.autotune", *options)
    assert found.returncode == 0, found.stderr
    table = tuned_tiles.read(tmp_path / "tiles.json", "interpreter")
    assert table[entry] == tuned_tiles.Measured(BEST, 1.0, None)
    assert table[Entry("statistics_kernel", 128, False, False)].milliseconds > 0
    assert "statistics_kernel" in found.stdout and str(tmp_path / "tiles.json") in found.stdout


def test_where_the_kernels_cannot_run_the_command_says_so(tmp_path):
    found = run(
        "-m", "fastgessl.kernels.similarity.autotune", "--out", tmp_path / "tiles.json", TRITON_INTERPRET="0"
    )
    if torch.cuda.is_available():
        pytest.skip("they can here")
    assert (
        found.returncode == 2
        and "tiles are measured on an NVIDIA GPU" in found.stderr
        and "Traceback" not in found.stderr
    )


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No table read yet, none named, an empty cache folder."""
    monkeypatch.setattr(tuned_tiles, "_in_use", {})
    monkeypatch.delenv(tuned_tiles.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("fresh")
def test_without_a_table_the_shipped_tile_is_taken():
    assert tuned_tiles.tile_for("moments_kernel", torch.zeros(1), 100, False) == INTERPRETED


def test_a_home_folder_that_may_not_be_searched_holds_no_table(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned_tiles, "_in_use", {})
    monkeypatch.delenv(tuned_tiles.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    (tmp_path / "closed").mkdir(mode=0o000)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may search every folder
    try:
        with pytest.raises(PermissionError):
            os.stat(tuned_tiles.table_path(CPU))
        assert tuned_tiles.tile_for("moments_kernel", torch.zeros(1), 100, False) == INTERPRETED
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


def test_the_cache_folders_table_is_found_by_device_and_triton_version(fresh):
    pytest.importorskip("triton")
    path = tuned_tiles.table_path(CPU)
    assert path == fresh / "fastgessl" / f"tiles-interpreter-triton-{version('triton')}.json"
    tuned_tiles.write(
        path, "interpreter", {Entry("moments_kernel", 256, False, True): tuned_tiles.Measured(BEST, 1.0, 2.0)}
    )
    assert tuned_tiles.tile_for("moments_kernel", torch.zeros(1), 200, False) == BEST
    assert tuned_tiles.tile_for("moments_kernel", torch.zeros(1), 300, False) == INTERPRETED
    assert (
        tuned_tiles.tile_for("moments_kernel", torch.zeros(1, dtype=torch.float16), 200, False) == INTERPRETED
    )


def entry_with(**change):
    tile = {"rows": 64, "columns": 64, "warps": 4, "stages": 2, "chunk_limit": 64}
    whole = {
        "kernel": "moments_kernel",
        "features": 128,
        "teacher": False,
        "dtype": "16-bit",
        "tile": tile,
        "milliseconds": 1,
    }
    whole |= {name: value for name, value in change.items() if name in whole}
    whole["tile"] = (
        tile | {name: value for name, value in change.items() if name in tile}
        if whole["tile"] is tile
        else whole["tile"]
    )
    return {"format": 1, "device": "interpreter", "tiles": [whole]}


BAD = {
    "no JSON": ("{", "Expecting property name"),
    "another format": ({"format": 2}, "no table of format 1"),
    "another device": (
        {"format": 1, "device": "nvidia-h200", "tiles": []},
        r"measured on 'nvidia-h200', this device is 'interpreter'",
    ),
    "no list": ({"format": 1, "device": "interpreter"}, "tiles must be a list"),
    "no tile": (
        entry_with(tile=None),
        r"tiles\[0\] must have kernel, features, teacher, dtype, and a tile of rows, columns",
    ),
    "unknown kernel": (
        entry_with(kernel="fwd"),
        r"tiles\[0\]: kernel must be one of .*statistics_kernel.*, found 'fwd'",
    ),
    "unknown width": (entry_with(features=100), r"features must be one of 128, 256, 2048, found 100"),
    "no power of two": (entry_with(rows=48), r"rows must be a power of two from 16 to 256, found 48"),
    "too wide": (entry_with(columns=512), r"columns must be a power of two from 16 to 256, found 512"),
    "no whole number": (entry_with(warps=4.0), r"warps must be a power of two from 1 to 16, found 4.0"),
    "no time": (entry_with(milliseconds=None), r"milliseconds must be a number, found None"),
    "too many stages": (entry_with(stages=9), r"stages must be a number from 1 to 8, found 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_with_file_entry_and_remedy(name, fresh, monkeypatch):
    content, message = BAD[name]
    path = fresh / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv(tuned_tiles.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match=rf"tile table .*tiles\.json: .*{message}.*Delete it"):
        tuned_tiles.tile_for("moments_kernel", torch.zeros(1), 100, False)


def test_a_good_table_is_not_refused(fresh, monkeypatch):
    path = fresh / "tiles.json"
    path.write_text(json.dumps(entry_with()))
    monkeypatch.setenv(tuned_tiles.ENVIRONMENT, str(path))
    assert tuned_tiles.tile_for("moments_kernel", torch.zeros(1).half(), 100, False) == Tile(64, 64, 4, 2, 64)


def test_a_named_table_that_is_missing_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv(tuned_tiles.ENVIRONMENT, str(fresh / "absent.json"))
    with pytest.raises(ValueError, match=r"FASTGESSL_TILES names .*absent\.json, which is no file"):
        tuned_tiles.tile_for("moments_kernel", torch.zeros(1), 100, False)


def test_a_table_whose_writing_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    path, entry = tmp_path / "tiles.json", Entry("moments_kernel", 256, False, True)
    tuned_tiles.write(path, "interpreter", {entry: tuned_tiles.Measured(BEST, 1.0, None)})
    whole = Path.write_text

    def cut(file, text):
        whole(file, text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="no space"):
        tuned_tiles.write(path, "interpreter", {entry: tuned_tiles.Measured(BEST, 2.0, None)})

    assert tuned_tiles.read(path, "interpreter") == {entry: tuned_tiles.Measured(BEST, 1.0, None)}


def tuned_where(monkeypatch, failure):
    """What tuning finds if every tile but the shipped one fails like this; no kernel runs."""
    from fastgessl.kernels.similarity import launch as similarity_launch

    class Problem:
        def __init__(self, *_):
            pass

        def results(self, module):
            if module is similarity_launch and list(tuned_tiles.tuned_tiles(CPU).values()) != [INTERPRETED]:
                raise failure
            return (torch.ones(2),)

    monkeypatch.setattr(autotune, "Problem", Problem)
    monkeypatch.setattr(tuned_tiles, "_in_use", {CPU: {}})
    return autotune.tune(
        Entry("statistics_kernel", 128, False, False), 8, 16, CPU, lambda work: 1.0, math.inf
    )


def test_a_tile_on_which_the_compiler_fails_is_left_out_with_its_reason(monkeypatch, capsys):
    pytest.importorskip("triton")
    found = tuned_where(monkeypatch, RuntimeError("PassManager::run failed"))
    assert found == tuned_tiles.Measured(INTERPRETED, 1.0, 1.0)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(list(autotune.neighbours(INTERPRETED)))
    assert all("is left out: RuntimeError: PassManager::run failed" in line for line in said)


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure"),
        torch.OutOfMemoryError("out of memory"),
        TypeError("a mistake of ours"),
    ],
    ids=lambda failure: str(failure)[:24],
)
def test_an_error_of_the_device_or_of_ours_ends_tuning(monkeypatch, failure):
    pytest.importorskip("triton")
    with pytest.raises(type(failure), match=re.escape(str(failure)[:10])):
        tuned_where(monkeypatch, failure)
