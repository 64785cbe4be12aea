"""Run the Triton kernels in Triton's interpreter and print, as JSON, their errors against the dense reference
in float64.

A program of its own because TRITON_INTERPRET must be set before the kernels are defined. Input: a list of
cases on stdin.
"""

import json
import sys
from tempfile import NamedTemporaryFile

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from fastgessl.kernels import (
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    similarity_logsumexp,
    soft_cross_entropy,
)
from fastgessl.kernels.similarity import launch as similarity_launch


def operands(case):
    generator = torch.Generator().manual_seed(case["M"] + case["D"])
    rows, columns, dtype = case["M"], case["N"], getattr(torch, case["dtype"])

    def unit(n, width):
        return normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1)

    keys, teacher_keys = unit(columns, case["D"]), unit(columns, case.get("E", case["D"]))
    positives = torch.randint(0, columns, (rows,), generator=generator)
    noise = 1.5 if case["temperature"] > 0.05 else 4.0
    queries = normalize(keys[positives] + noise * unit(rows, case["D"]), dim=1)
    teacher_queries = normalize(teacher_keys[positives] + noise * unit(rows, case.get("E", case["D"])), dim=1)
    positives[::7] = -1
    masks = {"positives": positives}
    if case.get("exclude"):
        masks["exclude"] = torch.randint(-1, columns, (rows, case["exclude"]), generator=generator)
    if case.get("empty"):
        masks["exclude"] = torch.zeros(rows, 1, dtype=torch.int64)
    bias = torch.randn(2, columns, generator=generator, dtype=torch.float64).float()
    return [part.to(dtype) for part in (queries, keys, teacher_queries, teacher_keys)], masks, bias


def loss_rows(case, leaves, temperature, masks, bias, implementation):
    """The case's losses, one number a row."""
    shared = {"temperature": temperature, "implementation": implementation, "exclude": masks.get("exclude")}
    if case["loss"] == "info_nce":
        ring = (
            {"group": dist.group.WORLD, "mode": "ring"}
            if case.get("ring") and implementation == "triton"
            else {}
        )
        return (info_nce(*leaves[:2], positives=masks["positives"], reduction="none", **shared, **ring),)
    if case["loss"] == "clip":
        return (
            clip_loss(*leaves[:2], temperature=temperature, reduction="none", implementation=implementation),
        )
    if case["loss"] == "nt_xent":
        return (
            nt_xent(*leaves[:2], temperature=temperature, reduction="none", implementation=implementation),
        )
    if case["loss"] == "logsumexp":
        lse = similarity_logsumexp(*leaves[:2], bias=bias[0], **shared)
        return (lse.masked_fill(lse == -torch.inf, 0.0),)
    sides = {"student_bias": bias[0], "teacher_bias": bias[1]} if case.get("bias") else {}
    if case["loss"] == "cross_entropy":
        return (soft_cross_entropy(*leaves, teacher_temperature=0.5, reduction="none", **sides, **shared),)
    return gessl_loss(*leaves, positives=masks["positives"], **sides, **shared)


def everything(case, parts, masks, bias, temperature, implementation):
    """Losses, gradients, and the gradient of ⟨student's gradient, a direction⟩: to the student, to the rows'
    weights, and the cross-term to the teacher."""
    leaves = [part.clone().requires_grad_() for part in parts]
    temperature, bias = temperature.clone().requires_grad_(), bias.clone().requires_grad_()
    rows = loss_rows(case, leaves, temperature, masks, bias, implementation)
    generator = torch.Generator().manual_seed(0)
    size = case.get("weight", 1.0)
    weights = [
        (size * torch.randn(len(part), generator=generator).to(part.dtype) / len(part)).requires_grad_()
        for part in rows
    ]
    total = sum((weight * part).sum() for weight, part in zip(weights, rows, strict=True))
    inputs = [*leaves, temperature, bias, *weights]
    first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    moved = [
        grad
        for grad in (*first[:2], first[4], first[5] if case["loss"] == "logsumexp" else None)
        if grad is not None
    ]
    along = sum((grad * torch.randn(grad.shape, generator=generator).to(grad.dtype)).sum() for grad in moved)
    second = torch.autograd.grad(along * case["temperature"], inputs, allow_unused=True)
    names = [
        "query",
        "key",
        "teacher_query",
        "teacher_key",
        "temperature",
        "bias",
        *(f"weight{i}" for i in range(len(weights))),
    ]
    found = {f"loss{i}": part for i, part in enumerate(rows)}
    found |= {f"d_{name}": part for name, part in zip(names, first, strict=True) if part is not None}
    return found | {f"dd_{name}": part for name, part in zip(names, second, strict=True) if part is not None}


def errors(case):
    parts, masks, bias = operands(case)
    temperature = torch.tensor(case["temperature"])
    found = everything(case, parts, masks, bias, temperature, "triton")
    wide = [part.double() for part in parts]
    expected = everything(case, wide, masks, bias.double(), temperature.double(), "reference")
    assert found.keys() == expected.keys() and all(part.isfinite().all() for part in found.values())
    error = {}
    for name, part in expected.items():
        size = float(part.norm())
        if part.dim() == 0:
            # The temperature's derivative is a cancelling sum, -Σ q·dq / τ: its error counts against the size
            # of the terms.
            size = max(
                size, float(expected[name.replace("temperature", "query")].norm()) / case["temperature"]
            )
        error[name] = float((found[name].double() - part).norm()) / max(size, 1e-12)
    return error


if __name__ == "__main__":
    torch.set_num_threads(1)
    similarity_launch.STRIPS = (
        2  # so that a program of the symmetric forward has more than one block of rows to take
    )
    with NamedTemporaryFile() as store:
        dist.init_process_group("gloo", store=dist.FileStore(store.name, 1), rank=0, world_size=1)
    print(json.dumps([errors(case) for case in json.load(sys.stdin)]))
