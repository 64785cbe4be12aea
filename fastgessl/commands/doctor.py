"""`fastgessl doctor`: what this machine has, and which engine and kernels a run here will use, and why."""

import importlib.util
import os

import torch
from rich.console import Console
from rich.table import Table

from fastgessl.recipes import Parser
from fastgessl.runs import PACKAGES, version_of


def main(words: list[str]) -> None:
    """Run the command."""
    Parser(program="doctor", description=__doc__).parse_args(words)
    table = Table(title="fastgessl doctor", title_justify="left")
    for column in ("what", "found", "so"):
        table.add_column(column, overflow="fold")
    for row in findings():
        table.add_row(*row)
    Console().print(table)


def findings() -> list[tuple[str, str, str]]:
    """(what, found, what follows from it), in the order in which a run depends on them."""
    cuda, threads = torch.version.cuda or "none", torch.get_num_threads()
    triton = version_of("triton")
    return [
        ("torch", f"{torch.__version__}, CUDA {cuda}", f"{threads} threads on {os.cpu_count()} cores"),
        *_gpus(),
        (
            "triton",
            triton or "absent",
            "compiles our kernels on a GPU" if triton else "kernels run as chunked PyTorch",
        ),
        _kernels(),
        _dali(),
        _nccl(),
        _packages(),
    ]


def _gpus() -> list[tuple[str, str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none", "training runs on the CPU in fp32")]
    from fastgessl.distributed import precision_of_gpu

    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        rows.append((f"GPU {index}", found, f"training in {precision_of_gpu()}"))
    return rows


def _kernels() -> tuple[str, str, str]:
    from fastgessl.kernels import implementation_for

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = implementation_for(torch.empty(1, 1, device=device))
    small = "" if device == "cuda" else "; small tables are stored instead, which is faster on a CPU"
    return "kernels", name, reason + small


def _dali() -> tuple[str, str, str]:
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return (
            "DALI",
            "absent",
            "image files go through torchvision; pip install 'fastgessl[train]' brings DALI",
        )
    decoder = "mixed (nvJPEG)" if torch.cuda.is_available() else "cpu"
    version = version_of("nvidia-dali-cuda130") or version_of("nvidia-dali-cuda120") or "of unknown version"
    return (
        "DALI",
        version,
        f"image files are decoded by DALI, decoder {decoder}; arrays are resident",
    )


def _nccl() -> tuple[str, str, str]:
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        return "NCCL", ".".join(map(str, torch.cuda.nccl.version())), "several processes talk over NCCL"
    return "NCCL", "not usable without a GPU", "several processes talk over gloo"


def _packages() -> tuple[str, str, str]:
    """The packages of `fastgessl[train]` that are absent, so that an ImportError surprises nobody."""
    needed = [name for name in PACKAGES if not name.startswith(("nvidia-dali", "triton"))] + [
        "pydantic",
        "rich",
        "safetensors",
        "tensorboard",
    ]
    versions = {name: version_of(name) for name in needed}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if not version)
    return "packages", found, f"absent: {absent}" if absent else "all there"
