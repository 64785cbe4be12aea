"""What one of several gloo processes does for objective/test_ranks.py."""

import torch
import torch.distributed as dist
from method_cases import ALL, KINDS
from smooth_toys import BI_LEVEL, gradients, toy_labels, toy_method, toy_views
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastgessl.config import GesslConfig, UsageError
from fastgessl.distributed import rank_local, world_group, world_size
from fastgessl.methods import METHODS
from fastgessl.models import synchronise_batch_norm
from fastgessl.objective import GeSSL


def under_ddp(objective):
    return DistributedDataParallel(objective, broadcast_buffers=False)


def two_steps(method, objective, views, labels):
    """Gradient, loss and state after the second of two plain steps; the second shows that DDP's reducer is
    armed again.
    """
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        result = objective(views, step, labels=labels)
        result.loss.backward()
        optimizer.step()
        method.update_state([(result.outputs, result.targets)], step)
    return {"gradient": gradients(method), "loss": result.metrics["loss_ssl"], "state": method.state_dict()}


def first_gradient(name, settings, views, *, negatives="local", synchronised=False):
    method = toy_method(name, negatives=negatives)
    if synchronised:
        synchronise_batch_norm(method)
    objective = under_ddp(GeSSL(method, settings))  # must live for as long as the backward
    objective(views).loss.backward()
    return gradients(method)


def accumulated_gradient(name, settings, micro_batches):
    method = toy_method(name)
    objective = under_ddp(GeSSL(method, settings))
    with objective.no_sync():
        (objective(micro_batches[0]).loss / 2).backward()
    (objective(micro_batches[1]).loss / 2).backward()
    return gradients(method)


def sharded(name, settings, views):
    """Gradient and σ where fully_shard shards the objective as one unit, and what is said where it shards the
    backbone by itself.
    """
    method = toy_method(name)
    objective = GeSSL(method, settings)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    result = fully_shard(objective, mesh=mesh)(views)
    result.loss.backward()
    full = [p.grad.full_tensor().flatten() for p in method.parameters() if p.requires_grad]
    apart = toy_method(name)
    fully_shard(apart.backbone, mesh=mesh)
    try:
        refusal = f"σ {GeSSL(apart, settings)(views).metrics['sigma']}"
    except UsageError as error:
        refusal = str(error)
    plain = GeSSL(apart, GesslConfig())(views).loss
    return {
        "gradient": torch.cat(full),
        "sigma": result.metrics["sigma"],
        "refusal": refusal,
        "plain": plain.detach(),
    }


def report(rank, folder):
    assert dist.get_world_size() == world_size()
    with rank_local():
        assert world_size() == 1 and world_group() is None
    views, found = toy_views(seed=10 + rank), {}
    for name in METHODS:
        method = synchronise_batch_norm(toy_method(name, negatives="global"))
        objective = under_ddp(GeSSL(method, GesslConfig()))
        found["plain", name] = two_steps(method, objective, views, toy_labels(seed=10 + rank))
    for name in ALL:
        bi_level = BI_LEVEL if name in KINDS else {"exact": BI_LEVEL["exact"]}
        for label, settings in bi_level.items():
            sigma_alone = settings.model_copy(update={"w_ssl": 0.0})
            found["tasks", name, label] = first_gradient(name, settings, views)
            found["global negatives", name, label] = first_gradient(name, settings, views, negatives="global")
            for key, chosen in (("synchronised tasks", sigma_alone), ("both", settings)):
                found[key, name, label] = first_gradient(
                    name, chosen, views, negatives="global", synchronised=True
                )
            found["sharded", name, label] = sharded(name, settings, views)
        found["global negatives", name, "plain"] = first_gradient(
            name, GesslConfig(), views, negatives="global"
        )
        found["accumulated", name] = accumulated_gradient(
            name, BI_LEVEL["exact"], [views, toy_views(seed=20 + rank)]
        )
    return found
