"""A ring of one rank is the loss over that rank's own keys, and keys that need no gradient may travel too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastgessl.kernels import info_nce

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from fastgessl.kernels import info_nce

folder, frozen = sys.argv[1], sys.argv[2] == "True"
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 1), rank=0, world_size=1)
query, key = torch.load(folder + "/rows.pt", weights_only=True)
query.requires_grad_()
key.requires_grad_(not frozen)
loss = info_nce(query, key, group=dist.group.WORLD, mode="ring")
gradients = torch.autograd.grad(loss, (query,) if frozen else (query, key))
torch.save([loss.detach(), *gradients], folder + "/found.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_a_ring_of_one_rank_is_the_loss_without_a_group(tmp_path, frozen):
    query, key = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.save((query, key), tmp_path / "rows.pt")
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), str(frozen)], check=True, timeout=120)
    leaves = (query.requires_grad_(), key.requires_grad_())
    loss = info_nce(*leaves)
    expected = [loss, *torch.autograd.grad(loss, leaves)][: 2 if frozen else 3]
    for found, value in zip(torch.load(tmp_path / "found.pt", weights_only=True), expected, strict=True):
        torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-14)
