"""What one of two gloo processes does for test_batch_norm.py: batch_norm_ranks.py RANK WORLD_SIZE FOLDER.
Writes FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fastgessl.distributed import rank_local
from fastgessl.models import synchronise_batch_norm

ROWS = [3, 5]
"""Rows of each rank: unequal, as in the last batch of an evaluation."""


def case(shape, dtype=torch.float64, offset=0.0):
    """Inputs of all ranks, cotangents for the first gradients, and a batch norm with weights that are not 1
    and 0.
    """
    torch.manual_seed(0)
    rows = offset + torch.randn(sum(ROWS), *shape, dtype=dtype)
    tangents = torch.randn_like(rows), torch.randn(shape[0], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    norm = (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(shape[0], dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return rows, tangents, norm


def derivatives(norm, rows, tangents):
    """Output, first gradients of sum(out³ + sin out), and second ones: the gradients of ⟨first, tangents⟩."""
    inputs = [rows.detach().requires_grad_(), norm.weight, norm.bias]
    out = norm(inputs[0])
    first = torch.autograd.grad((out**3 + out.sin()).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(
        sum((slope * tangent).sum() for slope, tangent in zip(first, tangents, strict=True)), inputs
    )
    return out.detach(), [slope.detach() for slope in first], list(second)


def summed(slopes):
    """A rank's weight and bias see its own rows only: the total is the sum, which DDP makes."""
    for slope in slopes[1:]:
        dist.all_reduce(slope)
    return slopes


def main(rank, size, folder):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size
    )
    report = {"world_size": dist.get_world_size()}
    for shape in ((4,), (4, 3, 3)):
        rows, tangents, norm = case(shape)
        norm = synchronise_batch_norm(norm)
        own = rows.split(ROWS)[rank], (tangents[0].split(ROWS)[rank], *tangents[1:])
        out, first, second = derivatives(norm, *own)
        report["derivatives", shape] = out, summed(first), summed(second)
        report["running", shape] = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        report["evaluation", shape] = norm.eval()(own[0]).detach()
        with rank_local():
            report["alone", shape] = norm.train()(own[0]).detach()
    rows, _, norm = case((4, 3, 3), torch.float32, offset=1e3)
    report["far from zero"] = synchronise_batch_norm(norm)(rows.split(ROWS)[rank]).detach()
    norm = synchronise_batch_norm(nn.BatchNorm1d(4, momentum=None, affine=False, dtype=torch.float64))
    for factor in (1.0, 2.0, 4.0):
        norm(factor * case((4,))[0].split(ROWS)[rank])
    report["cumulative"] = dict(norm.named_buffers())
    report["bfloat16"] = synchronise_batch_norm(case((4, 3, 3), torch.float32)[2])(
        case((4, 3, 3))[0].split(ROWS)[rank].bfloat16()
    ).detach()
    torch.save(report, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
