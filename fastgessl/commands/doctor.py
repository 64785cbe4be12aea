"""`fastgessl doctor`: what this machine has, and which engine and kernels a run here will use, and why."""

import importlib.util
import os
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from fastgessl.recipes import Parser
from fastgessl.runs import PACKAGES


def main(words: list[str]) -> None:
    """Run the command."""
    Parser(program="doctor", description=__doc__).parse_args(words)
    print_findings()


def findings() -> list[tuple[str, str, str]]:
    """(what, found, what follows from it), in the order in which a run depends on them."""
    return [_torch(), *_gpus(), _triton(), _kernels(), _dali(), _nccl(), *_missing()]


def print_findings() -> None:
    table = Table(title="fastgessl doctor", title_justify="left")
    for column in ("what", "found", "so"):
        table.add_column(column, overflow="fold")
    for row in findings():
        table.add_row(*row)
    Console().print(table)


def _torch() -> tuple[str, str, str]:
    return (
        "torch",
        f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores",
    )


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


def _triton() -> tuple[str, str, str]:
    version = _version("triton")
    return (
        "triton",
        version or "absent",
        "compiles our kernels on a GPU" if version else "kernels run as chunked PyTorch",
    )


def _kernels() -> tuple[str, str, str]:
    from fastgessl.kernels import implementation_for

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = implementation_for(torch.empty(1, 1, device=device))
    small = "" if device == "cuda" else "; small tables are stored instead, which is faster on a CPU"
    return "kernels", name, reason + small


def _dali() -> tuple[str, str, str]:
    version = _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120")
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return (
            "DALI",
            "absent",
            "image files go through torchvision; pip install 'fastgessl[train]' brings DALI",
        )
    decoder = "mixed (nvJPEG)" if torch.cuda.is_available() else "cpu"
    return (
        "DALI",
        version or "of unknown version",
        f"image files are decoded by DALI, decoder {decoder}; arrays are resident",
    )


def _nccl() -> tuple[str, str, str]:
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        return "NCCL", ".".join(map(str, torch.cuda.nccl.version())), "several processes talk over NCCL"
    return "NCCL", "not usable without a GPU", "several processes talk over gloo"


def _missing() -> list[tuple[str, str, str]]:
    """The packages of `fastgessl[train]` that are absent, so that an ImportError surprises nobody."""
    needed = [name for name in PACKAGES if not name.startswith(("nvidia-dali", "triton"))] + [
        "pydantic",
        "rich",
        "safetensors",
        "tensorboard",
    ]
    absent = [name for name in needed if not _version(name)]
    found = ", ".join(f"{name} {_version(name)}" for name in needed if _version(name))
    return [("packages", found, f"absent: {', '.join(absent)}" if absent else "all there")]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
