"""The kernels of views, compiled for cards that are not here: no register spilled, shared memory within
limits.
"""

import itertools
import os

import pytest

pytest.importorskip("triton")

from ahead_of_time import compiled

from fastgessl.kernels.views import triton as views_triton

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
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
QUICK = {
    ("whole_view[cifar-bilinear]", 80),
    ("whole_view[cifar-bilinear]", 90),
    ("whole_view[tinyimagenet-bicubic]", 90),
    ("crop[bicubic]", 90),
    ("colour[of bytes]", 90),
    ("blur[columns]", 90),
    ("whole_view[cifar-bilinear]", 100),
}
"""A second each; the rest runs with `make soak`."""


def kind(argument):
    if argument in ("H", "W", "S"):
        return "i32"
    if argument == "threshold":
        return "fp32"
    return {"p_images": "*u8", "p_chosen": "*i64"}.get(argument, "*fp32")


@pytest.mark.parametrize(
    "name, architecture",
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, ARCHITECTURES)
    ],
)
def test_kernel_compiles_without_spill(name, architecture):
    kernel, flags = CASES[name]
    compiled(kernel, architecture, flags, kind, num_warps=views_triton.warps_for(flags["BLOCK"]))
