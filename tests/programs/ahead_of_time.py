"""Compile a kernel for a card that is not here, and read what it uses. No GPU: Triton's own assembler and
disassembler do it.
"""

import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgessl.kernels.similarity import triton_first as similarity_triton
from fastgessl.kernels.similarity import triton_second as similarity_triton_second
from fastgessl.kernels.similarity.tiles import Tile

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        similarity_triton.statistics_kernel,
        similarity_triton.symmetric_statistics_kernel,
        similarity_triton.gradient_rows_kernel,
        similarity_triton.gradient_columns_kernel,
        similarity_triton_second.moments_kernel,
        similarity_triton_second.curvature_rows_kernel,
        similarity_triton_second.curvature_columns_kernel,
    )
}
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TEACHER_ONLY = {"p_teacher_query", "p_teacher_key", "p_teacher_scale"}
IN_OPERAND_DTYPE = {
    "p_query",
    "p_key",
    "p_teacher_query",
    "p_teacher_key",
    "p_tangent_query",
    "p_tangent_key",
    "p_out",
}


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int
    instruction: str
    """Matrix instruction: tcgen05, wgmma, mma.sync, or FMA if none."""


def resources(
    name: str,
    architecture: int,
    features: int,
    teacher: bool,
    tile: Tile,
    dtype: str = "bf16",
    of_teacher: bool = False,
    mirror: int = 0,
) -> Resources:
    kernel = KERNELS[name]
    flags = {
        "D": features,
        "E": features,
        "CHUNK": tile.chunk(features),
        "TEACHER_CHUNK": tile.chunk(features),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "POSITIVES": True,
        "EXCLUDE": 1,
        "BIAS": False,
        "TEACHER": teacher,
        "TEACHER_BIAS": False,
        "ENTROPY": True,
        "OF_TEACHER": of_teacher,
        "MIRROR": mirror,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in flags:
            signature[argument], constants[argument] = "constexpr", flags[argument]
        elif (argument.endswith("_bias") and argument != "p_out_bias") or (
            argument in TEACHER_ONLY and not teacher
        ):
            signature[argument], constants[argument] = "constexpr", None
        elif argument in ("M", "N"):
            signature[argument] = "i32"
        else:
            signature[argument] = (
                "*i64"
                if argument in ("p_positives", "p_exclude")
                else f"*{dtype}"
                if argument in IN_OPERAND_DTYPE
                else "*fp32"
            )
            attributes[(i,)] = [["tt.divisibility", 16]]
    program = source(kernel, signature, constants, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return read(triton.compile(program, target=GPUTarget("cuda", architecture, 32), options=options))


def source(kernel, signature, constants, attributes):
    if "constexprs" in inspect.signature(ASTSource).parameters:
        return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor  # before triton 3.3

    plain = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    aligned = [place for ((place,), _) in attributes.items()]
    descriptor = AttrsDescriptor.from_dict(
        {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
    )
    return ASTSource(fn=kernel, signature=plain, constants=constants, attrs=descriptor)


def read(compiled) -> Resources:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    text = subprocess.run(
        [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
    ).stdout
    os.unlink(file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK"))
    ptx = compiled.asm["ptx"]
    found = [
        short
        for short, long in (
            ("tcgen05", "tcgen05.mma"),
            ("wgmma", "wgmma.mma_async"),
            ("mma.sync", "mma.sync"),
        )
        if long in ptx
    ]
    return Resources(registers, stack, compiled.metadata.shared, (found or ["FMA"])[0])
