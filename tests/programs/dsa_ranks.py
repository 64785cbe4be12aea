"""What one of two gloo processes does for methods/test_dsa.py."""

import torch
from smooth_toys import gradients
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import method_config, toy_images

from fastgessl.config import DsaConfig, GesslConfig
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


def toy(name="simclr", negatives="local", settings=SETTINGS, images=8):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Tanh())
    backbone.num_features = 6
    facts = RunFacts(total_steps=10, images_per_forward=images, negatives=negatives)
    method = build_method(method_config(name, **OPTIONS.get(name, {})), backbone, facts)
    return DSA(settings, method, facts, view_size=2).double()


def views(seed=0, count=2):
    return toy_images(seed, count, images=8)


def step(method, objective, images):
    """Gradients, metrics and state after one step of plain gradient descent."""
    result = objective(images)
    result.loss.backward()
    torch.optim.SGD(method.parameters(), lr=0.1).step()
    method.update_state([(result.outputs, result.targets)], 0)
    return {"gradient": gradients(method), "metrics": result.metrics, "state": method.state_dict()}


def report(rank, folder):
    found, images = {}, views(10 + rank)
    for name in ("simclr", "byol", "swav"):
        method = synchronise_batch_norm(toy(name, "global", images=16))
        objective = DistributedDataParallel(GeSSL(method, GesslConfig()), broadcast_buffers=False)
        found[name] = step(method, objective, images)
    method = toy(images=16)
    objective = DistributedDataParallel(GeSSL(method, BI_LEVEL), broadcast_buffers=False)
    found["tasks"] = step(method, objective, images)
    # In evaluation mode batch norm couples no images, so that what ranks exchange is the loss's alone.
    method = toy("simclr", "global", images=16).eval()
    found["across"] = step(method, DistributedDataParallel(GeSSL(method, BI_LEVEL)), images)
    return found
