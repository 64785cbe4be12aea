"""Every tile of the launch table, compiled ahead of time for its card: no spill, shared memory within limits,
matrix instructions.
"""

import os

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from fastgessl.kernels.similarity import launch as similarity_launch
from fastgessl.kernels.similarity import triton_first as similarity_triton
from fastgessl.kernels.similarity.tiles import (
    ARCHITECTURES,
    FLOAT32,
    KERNELS,
    TABLE,
    WIDTHS,
    WITHOUT_TEACHER,
    generation,
    tile_of,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

import importlib.util
from pathlib import Path

_program = Path(__file__).parents[2] / "programs" / "ahead_of_time.py"
_spec = importlib.util.spec_from_file_location("ahead_of_time", _program)
ahead_of_time = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ahead_of_time)

INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
EVERY = [
    (name, architecture, width, teacher, dtype)
    for dtype in ("bf16", "fp32")
    for architecture in ARCHITECTURES
    for width in WIDTHS
    for name in KERNELS
    for teacher in (False, True)
    if not (teacher and name in WITHOUT_TEACHER)
]
# Seconds each; the rest runs with `make soak`.
QUICK = [
    case
    for case in EVERY
    if case[1] in (80, 90, 100) and case[2] == 128 and case[4] == "bf16" and not case[3]
]


def check(name, architecture, width, teacher, dtype):
    if architecture >= 100 and ahead_of_time.TRITON < (3, 3):
        pytest.skip("Triton 3.2 does not know this generation; `dispatch` does not send it there")
    tile = tile_of(name, architecture, width, teacher, dtype == "fp32")
    plain = name.removesuffix("[mirror]")
    to_teacher = (False, True) if teacher and plain.startswith(("gradient", "curvature")) else (False,)
    for of_teacher in to_teacher:
        found = ahead_of_time.resources(
            plain, architecture, width, teacher, tile, dtype, of_teacher, mirror=2 * name.endswith("[mirror]")
        )
        print(
            f"{name:28} sm_{architecture} D={width:<5}{dtype} teacher={teacher:d} to_teacher={of_teacher:d} "
            f"{tile} -> {found}"
        )
        # Older compilers spill a few bytes in some tiles (3.2 at most 168, for sm_80): slower, not wrong.
        assert found.stack == 0 or ahead_of_time.TRITON < (3, 6)
        assert found.shared <= ahead_of_time.SHARED_LIMIT[architecture]
        # tf32 in three passes has no wgmma or tcgen05 form everywhere: any matrix instruction will do there.
        assert found.instruction == INSTRUCTION[architecture] or (
            dtype == "fp32" and found.instruction != "FMA"
        )


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_tile_compiles_without_spill_and_within_shared_memory(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY if case not in QUICK], ids=str)
def test_every_tile_compiles_without_spill_and_within_shared_memory(case):
    check(*case)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_merge_of_the_columns_sums_compiles_without_spill(architecture):
    if architecture >= 100 and ahead_of_time.TRITON < (3, 3):
        pytest.skip("Triton 3.2 does not know this generation; `dispatch` does not send it there")
    kernel, flags = (
        similarity_triton.merge_strips_kernel,
        {"STRIPS": similarity_launch.STRIPS, "BLOCK_N": similarity_launch.MERGED_COLUMNS},
    )
    signature = {
        name: "constexpr" if name in flags else "i32" if name == "N" else "*fp32" for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.startswith("p_")
    }
    program = ahead_of_time.source(kernel, signature, flags, attributes)
    target = ahead_of_time.GPUTarget("cuda", architecture, 32)
    found = ahead_of_time.read(
        ahead_of_time.triton.compile(
            program, target=target, options={"num_warps": 4, "enable_fp_fusion": True}
        )
    )
    print(f"merge_strips_kernel sm_{architecture} -> {found}")
    assert found.stack == 0 and found.shared <= ahead_of_time.SHARED_LIMIT[architecture]


def test_every_launch_has_a_tile():
    for name, architecture, width, teacher, dtype in EVERY:
        assert tile_of(name, architecture, width - 1, teacher, dtype == "fp32").chunk(width) <= width
    assert {name.removesuffix("[mirror]") for name in KERNELS} == set(ahead_of_time.KERNELS)
    assert (
        {key[1] for key in TABLE}
        == {key[1] for key in FLOAT32}
        == {generation(architecture) for architecture in ARCHITECTURES}
    )
