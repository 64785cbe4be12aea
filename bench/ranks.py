"""Measure what ranks cost, under torchrun.

    python -m torch.distributed.run --nproc_per_node N -m bench.ranks FILE [--tiny]

Each row is the seconds of one forward and backward on every rank: a loss with keys gathered and with keys
passed round a ring, beside the gather that OpenCLIP users write around a dense loss; and a batch norm that
spans the ranks beside one that does not. The first process writes the slowest rank's medians to FILE.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from bench.test_losses import FEATURES, TEMPERATURE, pair
from fastgessl.kernels import clip_loss
from fastgessl.models import synchronise_batch_norm

Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("to", type=Path, help="file for the rows")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    # Every rank must take as many turns as the others, so a number of rounds says when to stop.
    calls = 2 if arguments.tiny else 20
    rows = {
        name: {"seconds": slowest(work, calls)} for name, work in contenders(device, arguments.tiny).items()
    }
    if dist.get_rank() == 0:
        arguments.to.write_text(json.dumps(rows))
    dist.destroy_process_group()


def slowest(work: Work, calls: int) -> float:
    """Seconds per call of the slowest rank; Timer warms up and waits for the device."""
    taken = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    seconds = torch.tensor(taken.timeit(calls).median, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def open_clip(image: Tensor, text: Tensor) -> Tensor:
    """local_loss with gather_with_grad: all features everywhere by a differentiable gather, then two dense
    tables of this rank's rows.
    """
    images, texts = (torch.cat(torch.distributed.nn.all_gather(part)) for part in (image, text))
    positives = len(image) * dist.get_rank() + torch.arange(len(image), device=image.device)
    to_text, to_image = image @ texts.T / TEMPERATURE, text @ images.T / TEMPERATURE
    return (F.cross_entropy(to_text, positives) + F.cross_entropy(to_image, positives)) / 2


def contenders(device: str, tiny: bool) -> dict[str, Work]:
    image, text = pair(32 if tiny else 4096, device, torch.float32)
    maps = torch.randn(8 if tiny else 64, FEATURES, 8, 8, device=device, requires_grad=True)
    local = nn.BatchNorm2d(FEATURES).to(device)
    synchronised = nn.Sequential(nn.BatchNorm2d(FEATURES)).to(device)
    synchronise_batch_norm(synchronised)

    def ours(mode: str, group: dist.ProcessGroup | None) -> Work:
        def work() -> object:
            loss = clip_loss(image, text, temperature=TEMPERATURE, group=group, mode=mode)
            return torch.autograd.grad(loss, (image, text))

        return work

    return {
        "ours, this rank's keys": ours("gather", None),
        "ours, gather": ours("gather", dist.group.WORLD),
        "ours, ring": ours("ring", dist.group.WORLD),
        "OpenCLIP's gather": lambda: torch.autograd.grad(open_clip(image, text), (image, text)),
        "batch norm": lambda: torch.autograd.grad(local(maps).square().sum(), maps),
        "batch norm, synchronised": lambda: torch.autograd.grad(synchronised(maps).square().sum(), maps),
    }


if __name__ == "__main__":
    main()
