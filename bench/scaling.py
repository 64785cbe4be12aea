"""What ranks cost, under torchrun: `python -m torch.distributed.run --nproc_per_node N -m bench.scaling --to
FILE [--tiny]`.

Each row is the seconds of one forward and backward on every rank: InfoNCE with keys gathered and with keys
passed round a ring, and a batch norm that spans the ranks beside one that does not. The first process writes
the rows, each with the slowest rank's median.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from bench.timing import in_turns
from fastgessl.kernels import info_nce
from fastgessl.models import synchronise_batch_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="file for the rows")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if on_gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        # Every rank must take as many turns as the others, so rounds and not seconds say when to stop.
        samples = in_turns(
            _contenders(arguments.tiny), rounds=3 if arguments.tiny else 30, budget=float("inf")
        )
        medians = torch.tensor(
            [statistics.median(taken) for taken in samples.values()], device="cuda" if on_gpu else "cpu"
        )
        dist.all_reduce(medians, dist.ReduceOp.MAX)
        rows = {
            name: {"seconds": seconds, "samples": samples[name]}
            for name, seconds in zip(samples, medians.tolist(), strict=True)
        }
        if rank == 0:
            arguments.to.write_text(json.dumps({"ranks": size, "backend": dist.get_backend(), "rows": rows}))
    finally:
        dist.destroy_process_group()


def _contenders(tiny: bool) -> dict[str, Callable[[], object]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width = (32, 16) if tiny else (4096, 128)
    query, key = (
        normalize(torch.randn(rows, width, device=device), dim=1).to(torch.bfloat16).requires_grad_()
        for _ in range(2)
    )
    group = dist.group.WORLD

    def loss(mode: str, over: dist.ProcessGroup | None) -> Callable[[], object]:
        return lambda: torch.autograd.grad(info_nce(query, key, group=over, mode=mode), (query, key))

    local = nn.BatchNorm2d(width).to(device)
    synchronised = nn.Sequential(nn.BatchNorm2d(width)).to(device)
    synchronise_batch_norm(synchronised)
    maps = torch.randn(8 if tiny else 64, width, 8, 8, device=device, requires_grad=True)

    def norm(module: nn.Module) -> Callable[[], object]:
        def work() -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(maps).square().sum(), maps)

        return work

    return {
        "InfoNCE, this rank's keys": loss("gather", None),
        "InfoNCE, gather": loss("gather", group),
        "InfoNCE, ring": loss("ring", group),
        "batch norm": norm(local),
        "batch norm, synchronised": norm(synchronised),
    }


if __name__ == "__main__":
    main()
