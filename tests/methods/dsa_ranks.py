"""What one of two gloo processes does for test_dsa.py: python dsa_ranks.py RANK WORLD_SIZE FOLDER. Writes
FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import method_config

from fastgessl.config import DsaConfig, GesslConfig, UsageError
from fastgessl.methods import DSA, RunFacts, build_method
from fastgessl.models import synchronise_batch_norm
from fastgessl.objective import GeSSL

SETTINGS = DsaConfig(weight=1.0, prior_weight=0.1, neighbours=4, discriminator_hidden=6, helper_momentum=0.9)
BI_LEVEL = GesslConfig(inner_steps=1, inner_lr=0.05, w_sigma=1.0)
OPTIONS = {
    "swav": {
        "prototypes": 9,
        "temperature": 0.3,
        "sinkhorn_epsilon": 0.3,
        "queue_length": 0,
        "freeze_epochs": 2.0,
    }
}


def toy(name="simclr", negatives="local", settings=SETTINGS, images=8, **facts):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Tanh())
    backbone.num_features = 6
    facts = RunFacts(total_steps=10, images_per_forward=images, negatives=negatives, **facts)
    method = build_method(method_config(name, **OPTIONS.get(name, {})), backbone, facts)
    return DSA(settings, method, facts, view_size=2).double()


def views(seed=0, images=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2)]


def step(method, objective, images):
    """Gradients, loss and state after one step of plain gradient descent."""
    result = objective(images)
    result.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    method.update_state([(result.outputs, result.targets)], 0)
    return {"gradient": gradient, "metrics": result.metrics, "state": method.state_dict()}


def refusal(**facts):
    """What is said of settings under which each of two ranks has 4 images, no more than the neighbours; "" if
    they are taken.
    """
    try:
        toy(negatives="global", images=8, **facts)
    except UsageError as error:
        return str(error)
    return ""


def main(rank, size, folder):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size
    )
    report = {"world_size": dist.get_world_size()}
    for name in ("simclr", "byol", "swav"):
        method = synchronise_batch_norm(toy(name, "global", images=16))
        report[name] = step(
            method,
            DistributedDataParallel(GeSSL(method, GesslConfig()), broadcast_buffers=False),
            views(10 + rank),
        )
    method = toy(images=16)
    report["tasks"] = step(
        method, DistributedDataParallel(GeSSL(method, BI_LEVEL), broadcast_buffers=False), views(10 + rank)
    )
    # In evaluation mode batch norm couples no images, so that what ranks exchange is the loss's alone.
    method = toy("simclr", "global", images=16).eval()
    report["across"] = step(method, DistributedDataParallel(GeSSL(method, BI_LEVEL)), views(10 + rank))
    report["refusals"] = {"plain": refusal(), "bi-level": refusal(bi_level=True)}
    torch.save(report, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
