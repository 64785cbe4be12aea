"""The kernels of views, compiled for cards that are not here: no register spilled, shared memory within
limits.
"""

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from fastgessl.kernels.views import triton as views_triton

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

_program = Path(__file__).parents[2] / "programs" / "ahead_of_time.py"
_spec = importlib.util.spec_from_file_location("ahead_of_time_of_views", _program)
ahead_of_time = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ahead_of_time)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BYTES = {"p_images"}
INTEGERS = {"H", "W", "S"}
BLOCKS = {"small": 256, "cifar": 1024, "tinyimagenet": 4096}
CASES = {
    **{
        f"whole_view[{name}-{'bicubic' if bicubic else 'bilinear' if resize else 'colour'}]": (
            views_triton.whole_view_kernel,
            {"RESIZE": resize, "BICUBIC": bicubic, "BLOCK": block},
        )
        for name, block in BLOCKS.items()
        for resize, bicubic in ((True, False), (True, True), (False, False))
    },
    "crop[bilinear]": (views_triton.crop_kernel, {"RESIZE": True, "BICUBIC": False, "BLOCK": 1024}),
    "crop[bicubic]": (views_triton.crop_kernel, {"RESIZE": True, "BICUBIC": True, "BLOCK": 1024}),
    "crop[of views]": (views_triton.crop_kernel, {"RESIZE": False, "BICUBIC": False, "BLOCK": 1024}),
    "colour[of bytes]": (views_triton.color_kernel, {"BYTES": True, "BLOCK": 1024, "BLOCKS": 64}),
    "colour[of crops]": (views_triton.color_kernel, {"BYTES": False, "BLOCK": 1024, "BLOCKS": 64}),
    "blur[rows]": (views_triton.blur_kernel, {"ROWS": True, "TAPS": 23, "BLOCK": 1024}),
    "blur[columns]": (views_triton.blur_kernel, {"ROWS": False, "TAPS": 23, "BLOCK": 1024}),
}
# A second each; the rest runs with `make soak`.
QUICK = [
    ("whole_view[cifar-bilinear]", 80),
    ("whole_view[cifar-bilinear]", 90),
    ("whole_view[tinyimagenet-bicubic]", 90),
    ("crop[bicubic]", 90),
    ("colour[of bytes]", 90),
    ("blur[columns]", 90),
    ("whole_view[cifar-bilinear]", 100),
]
EVERY = [(name, architecture) for name in CASES for architecture in ARCHITECTURES]


def check(name, architecture):
    if architecture >= 100 and ahead_of_time.TRITON < (3, 3):
        pytest.skip("Triton 3.2 does not know this generation; `dispatch` does not send it there")
    kernel, flags = CASES[name]
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in flags:
            signature[argument], constants[argument] = "constexpr", flags[argument]
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument == "threshold":
            signature[argument] = "fp32"
        else:
            signature[argument] = (
                "*u8" if argument in BYTES else "*i64" if argument == "p_chosen" else "*fp32"
            )
            attributes[(i,)] = [["tt.divisibility", 16]]
    program = ahead_of_time.source(kernel, signature, constants, attributes)
    options = {"num_warps": views_triton.warps_for(flags["BLOCK"]), "enable_fp_fusion": True}
    found = ahead_of_time.read(
        triton.compile(program, target=GPUTarget("cuda", architecture, 32), options=options)
    )
    print(f"{name:36} sm_{architecture} -> {found}")
    # Older compilers spill a few bytes: slower, not wrong.
    assert found.stack == 0 or ahead_of_time.TRITON < (3, 6)
    assert found.shared <= ahead_of_time.SHARED_LIMIT[architecture]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_kernel_compiles_without_spill(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY if case not in QUICK], ids=str)
def test_every_kernel_compiles_without_spill_for_every_card(case):
    check(*case)
