"""Several gloo processes on this machine, for what only ranks can show."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Program = Callable[[int, Path], dict[Any, Any]]


def launch(program: Program, ranks: int, folder: Path) -> list[dict[Any, Any]]:
    """What `program(RANK, FOLDER)` returns on each rank. Fails as soon as one of them does."""
    torch.multiprocessing.spawn(_rank, (program, ranks, folder), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, program: Program, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # What Accelerate asks of a launcher; it joins the group that is there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    store, limit = dist.FileStore(str(folder / "store"), ranks), timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    assert dist.get_world_size() == ranks
    torch.save(program(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
