"""FSDP2: weights, gradients and optimiser state in parts on every rank, and the one form in which checkpoints
hold them.

Zhao et al., "PyTorch FSDP", VLDB 2023; `torch.distributed.fsdp.fully_shard`. A checkpoint holds whole tensors
under the names of the unsharded module, so that a run continues on another number of ranks, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm


def shard(objective: nn.Module, device: torch.device, world_size: int, *, whole: bool) -> nn.Module:
    """`objective` with its parameters sharded over all ranks, in place; the optimiser is to be built after
    this.

    Not `whole`: each block of a backbone is a unit, and no rank ever holds more than a few gathered blocks.
    `whole`: the objective is one unit, whose weights are all gathered for a step, which GeSSL's inner steps
    need.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    if not whole:
        for block in list(_blocks(objective)):
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the outermost lists of layers: residual blocks, transformer blocks, stages."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(module, FSDPModule)


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """The module's state with whole tensors on the CPU. Collective if it is sharded; only rank 0 then gets
    them.
    """
    if is_sharded(module):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return module.state_dict()


def load_whole_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """The reverse; every rank has `weights`. Raises RuntimeError if they are another module's."""
    if is_sharded(module):
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with whole tensors on every rank, where they are. Collective if they are sharded."""
    return {name: _whole(value) for name, value in module.state_dict().items()}


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, () float32, the same on every rank if they are sharded."""
    return _whole(get_total_norm(list(tensors))).float()


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors. Collective if they are sharded."""
    state = optimizer.state_dict()
    gathered = {
        index: {name: _whole(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": gathered, "param_groups": state["param_groups"]}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse; every rank has `state`, and the optimiser gets tensors of its own. Raises ValueError if it
    is another optimiser's.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        shape = parameters[index].shape
        wrong = [
            name
            for name, value in entry.items()
            if isinstance(value, Tensor) and value.dim() and value.shape != shape
        ]
        if wrong:
            raise ValueError(
                f"the optimiser's {wrong[0]} of parameter {index} has shape {tuple(entry[wrong[0]].shape)}, "
                f"not {tuple(shape)}"
            )
        own[index] = {name: _like(value, parameters[index]) for name, value in entry.items()}
    optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """A tensor of its own, sharded as the parameter is; the file that it was read from may be deleted at any
    time.
    """
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.clone()
