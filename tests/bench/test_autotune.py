"""Measuring tiles, from the command to the losses that read the table, in Triton's interpreter."""

import json

import pytest
import torch
from interpreter import interpreted, skip_without_interpreter

LOSS = """
import torch
from fastgessl.kernels import info_nce
rows = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
loss = info_nce(rows.bfloat16(), rows.bfloat16(), implementation="triton")
torch.testing.assert_close(loss, info_nce(rows, rows, implementation="reference"), rtol=1e-2, atol=1e-2)
"""


def test_the_command_measures_a_kernel_keeps_the_rest_of_the_table_and_losses_read_it(tmp_path):
    skip_without_interpreter()
    path = tmp_path / "tiles.json"
    tile = {"rows": 16, "columns": 16, "warps": 4, "stages": 1, "chunk_limit": 128}
    kept = {
        "entry": {"kernel": "moments_kernel", "width": 256, "teacher": True, "float32": True},
        "tile": tile,
    }
    path.write_text(json.dumps({"device": "interpreter", "tiles": [kept]}))
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
        path,
    )
    found = interpreted("-m", "bench.autotune", *options)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == str(path) and "statistics_kernel" in found.stdout
    first, *measured = json.loads(path.read_text())["tiles"]
    assert first == kept
    entries = [tuple(row["entry"].values()) for row in measured]
    assert entries[0] == ("statistics_kernel", 128, False, False) and measured[0]["milliseconds"] > 0
    read = interpreted("-c", LOSS, FASTGESSL_TILES=str(path))
    assert read.returncode == 0, read.stderr


def test_where_the_kernels_cannot_run_the_command_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("they can here")
    found = interpreted("-m", "bench.autotune", "--out", tmp_path / "tiles.json", TRITON_INTERPRET="0")
    assert found.returncode == 1 and "tiles are measured on an NVIDIA GPU" in found.stderr
    assert "Traceback" not in found.stderr
