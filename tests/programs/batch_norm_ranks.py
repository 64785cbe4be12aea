"""What one of two gloo processes does for models/test_batch_norm.py."""

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


def report(rank, folder):
    found = {}
    for shape in ((4,), (4, 3, 3)):
        rows, tangents, norm = case(shape)
        norm = synchronise_batch_norm(norm)
        own = rows.split(ROWS)[rank], (tangents[0].split(ROWS)[rank], *tangents[1:])
        out, first, second = derivatives(norm, *own)
        found["derivatives", shape] = out, summed(first), summed(second)
        found["running", shape] = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        found["evaluation", shape] = norm.eval()(own[0]).detach()
        with rank_local():
            found["alone", shape] = norm.train()(own[0]).detach()
    rows, _, norm = case((4, 3, 3), torch.float32, offset=1e3)
    found["far from zero"] = synchronise_batch_norm(norm)(rows.split(ROWS)[rank]).detach()
    norm = synchronise_batch_norm(nn.BatchNorm1d(4, momentum=None, affine=False, dtype=torch.float64))
    for factor in (1.0, 2.0, 4.0):
        norm(factor * case((4,))[0].split(ROWS)[rank])
    found["cumulative"] = dict(norm.named_buffers())
    found["bfloat16"] = synchronise_batch_norm(case((4, 3, 3), torch.float32)[2])(
        case((4, 3, 3))[0].split(ROWS)[rank].bfloat16()
    ).detach()
    return found
