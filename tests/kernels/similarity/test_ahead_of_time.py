"""Every tile of the launch table, compiled ahead of time for its card: no spill, shared memory within limits,
matrix instructions.
"""

import os

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from ahead_of_time import compiled

from fastgessl.kernels.similarity import launch, triton_first, triton_second
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

INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
TEACHER_ONLY = {"p_teacher_query", "p_teacher_key", "p_teacher_scale"}
IN_OPERAND_DTYPE = {
    *("p_query", "p_key", "p_teacher_query", "p_teacher_key"),
    *("p_tangent_query", "p_tangent_key", "p_out"),
}
EVERY = [
    (name, architecture, width, teacher, dtype)
    for dtype in ("bf16", "fp32")
    for architecture in ARCHITECTURES
    for width in WIDTHS
    for name in KERNELS
    for teacher in (False, True)
    if not (teacher and name in WITHOUT_TEACHER)
]


def quick(name, architecture, width, teacher, dtype):
    """Whether the case takes seconds at most; the rest runs with `make soak`."""
    return architecture in (80, 90, 100) and width == 128 and dtype == "bf16" and not teacher


def kernel_of(name):
    plain = name.removesuffix("[mirror]")
    return getattr(triton_first, plain, None) or getattr(triton_second, plain)


@pytest.mark.parametrize(
    "name, architecture, width, teacher, dtype",
    [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in EVERY],
)
def test_tile_compiles_without_spill_and_within_shared_memory(name, architecture, width, teacher, dtype):
    tile, kernel = tile_of(name, architecture, width, teacher, dtype == "fp32"), kernel_of(name)
    flags = {"D": width, "E": width, "CHUNK": tile.chunk(width), "TEACHER_CHUNK": tile.chunk(width)}
    flags |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "POSITIVES": True, "EXCLUDE": 1, "BIAS": False}
    flags |= {"TEACHER": teacher, "TEACHER_BIAS": False, "ENTROPY": True}
    flags |= {"MIRROR": 2 * name.endswith("[mirror]"), "PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}
    absent = {each for each in kernel.arg_names if each.endswith("_bias") and each != "p_out_bias"}
    flags |= dict.fromkeys(absent | (set() if teacher else TEACHER_ONLY))

    def kind(argument):
        if argument in ("M", "N"):
            return "i32"
        if argument in ("p_positives", "p_exclude"):
            return "*i64"
        return f"*{dtype}" if argument in IN_OPERAND_DTYPE else "*fp32"

    to_teacher = (False, True) if teacher and name.startswith(("gradient", "curvature")) else (False,)
    for of_teacher in to_teacher:
        own = flags | {"OF_TEACHER": of_teacher}
        found = compiled(kernel, architecture, own, kind, num_warps=tile.warps, num_stages=tile.stages)
        # tf32 in three passes has no wgmma or tcgen05 form everywhere: any matrix instruction will do there.
        assert found.instruction == INSTRUCTION[architecture] or (
            dtype == "fp32" and found.instruction != "FMA"
        )


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_merge_of_the_columns_sums_compiles_without_spill(architecture):
    flags = {"STRIPS": launch.STRIPS, "BLOCK_N": launch.MERGED_COLUMNS}
    compiled(
        triton_first.merge_strips_kernel,
        architecture,
        flags,
        lambda argument: "i32" if argument == "N" else "*fp32",
        num_warps=4,
    )


def test_every_launch_has_a_tile():
    for name, architecture, width, teacher, dtype in EVERY:
        assert tile_of(name, architecture, width - 1, teacher, dtype == "fp32").chunk(width) <= width
    assert all(kernel_of(name).arg_names for name in KERNELS)
    assert (
        {key[1] for key in TABLE}
        == {key[1] for key in FLOAT32}
        == {generation(architecture) for architecture in ARCHITECTURES}
    )
