"""Compile a kernel for a card that is not here, and read what it uses. No GPU: Triton's own assembler and
disassembler do it.
"""

import inspect
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MATRIX_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}


class Resources(NamedTuple):
    stack: int
    shared: int
    instruction: str
    """Matrix instruction: tcgen05, wgmma, mma.sync, or FMA if none."""


def compiled(
    kernel: Any, architecture: int, flags: dict[str, Any], kind: Callable[[str], str], **options: int
) -> Resources:
    """What the kernel uses on a card; `kind` says the type of each argument that is no flag. Nothing may
    spill, and shared memory must suffice.
    """
    if architecture >= 100 and TRITON < (3, 3):
        pytest.skip("Triton 3.2 does not know this generation; `dispatch` does not send it there")
    signature = {name: "constexpr" if name in flags else kind(name) for name in kernel.arg_names}
    constants = {name: flags[name] for name in kernel.arg_names if name in flags}
    aligned = [place for place, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    program = _source(kernel, signature, constants, aligned)
    found = _resources(
        triton.compile(
            program,
            target=GPUTarget("cuda", architecture, 32),
            options={"enable_fp_fusion": True, **options},
        )
    )
    print(f"{kernel.__name__:28} sm_{architecture} {flags} {options} -> {found}")
    # Older compilers spill a few bytes in some tiles (3.2 at most 168, for sm_80): slower, not wrong.
    assert found.stack == 0 or TRITON < (3, 6)
    assert found.shared <= SHARED_LIMIT[architecture]
    return found


def _source(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: list[int]
) -> ASTSource:
    if "constexprs" in inspect.signature(ASTSource).parameters:
        attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
        return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor  # before triton 3.3

    plain = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    descriptor = AttrsDescriptor.from_dict(
        {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
    )
    return ASTSource(fn=kernel, signature=plain, constants=constants, attrs=descriptor)


def _resources(compiled: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    stack = int(re.search(r"STACK:(\d+)", text)[1])
    used = [short for short, long in MATRIX_INSTRUCTIONS.items() if long in compiled.asm["ptx"]]
    return Resources(stack, compiled.metadata.shared, (used or ["FMA"])[0])
