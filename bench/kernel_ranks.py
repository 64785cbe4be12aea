"""The symmetric loss on two processes: ours gathered and in a ring, beside the gather that OpenCLIP users
write around a dense loss.

Forward and backward of each rank's own rows against all. `measure` starts the processes (gloo; NCCL on two
GPUs) and takes the slower rank's median.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.kernel_cases import TEMPERATURE, operands
from bench.timing import in_turns
from fastgessl.kernels import clip_loss

RANKS = 2


def open_clip(image: Tensor, text: Tensor) -> Tensor:
    """local_loss with gather_with_grad: all features everywhere by a differentiable gather, then two dense
    tables of this rank's rows.
    """
    images, texts = (torch.cat(torch.distributed.nn.all_gather(part)) for part in (image, text))
    positives = len(image) * dist.get_rank() + torch.arange(len(image), device=image.device)
    to_text, to_image = image @ texts.T / TEMPERATURE, text @ images.T / TEMPERATURE
    return (cross_entropy(to_text, positives) + cross_entropy(to_image, positives)) / 2


def contenders() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    shared: dict[str, Any] = {"temperature": TEMPERATURE, "group": dist.group.WORLD}
    return {
        "ours, gather": lambda image, text: clip_loss(image, text, mode="gather", **shared),
        "ours, ring": lambda image, text: clip_loss(image, text, mode="ring", **shared),
        "OpenCLIP's gather": open_clip,
    }


def _rank(rank: int, store: str, rows: int, budget: float, out: str) -> None:
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= RANKS
    device = f"cuda:{rank}" if on_gpus else "cpu"
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    image, text = (
        part.detach().chunk(RANKS)[rank].requires_grad_() for part in operands(rows, "cpu", torch.float32)
    )
    image, text = (part.detach().to(device).requires_grad_() for part in (image, text))
    work = {
        name: lambda loss=loss: torch.autograd.grad(loss(image, text), (image, text))
        for name, loss in contenders().items()
    }
    # The same number of rounds everywhere: a rank that stopped early would leave the other waiting.
    samples = in_turns(work, rounds=max(3, min(50, round(budget))), budget=1e9)
    Path(f"{out}.{rank}").write_text(
        json.dumps({name: statistics.median(taken) for name, taken in samples.items()})
    )
    dist.barrier()
    dist.destroy_process_group()


def measure(rows: int, budget: float) -> list[dict[str, Any]]:
    """Rows of a result file: `rows` pairs in all, half on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "seconds")
        mp.spawn(_rank, (str(Path(folder) / "store"), rows, budget, out), nprocs=RANKS)
        found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(RANKS)]
    shared = {"loss": "clip", "pass": "backward", "rows": rows, "ranks": RANKS}
    return [shared | {"peer": name, "seconds": max(part[name] for part in found)} for name in found[0]]
