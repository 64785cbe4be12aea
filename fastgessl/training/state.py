"""Holds everything that the next optimizer step depends on: what is saved, what is restored, and what a bad
step must give back.

With FSDP2 every rank holds a part of weights, gradients and optimizer state (Zhao et al., "PyTorch FSDP",
VLDB 2023). A checkpoint holds whole tensors under the names of the unsharded module, so that a run continues
on another number of ranks, sharded or not.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastgessl import runs, schedules
from fastgessl.build import Plan, build_objective
from fastgessl.config import Config, UsageError
from fastgessl.evaluate import OnlineProbe
from fastgessl.models import build_backbone
from fastgessl.pipelines import DataError, Loader
from fastgessl.runs import checkpoint
from fastgessl.training.optimizers import build_optimizer, clip_each


class Training:
    """The parts of a run that a checkpoint must restore: objective, optimizer, scaler, loader, online probe,
    random states; and the schedules, which follow from the step.
    """

    step = 0
    """Optimizer steps done; also the number of the next one."""
    skipped = 0
    """How many of them were skipped because they were not finite."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        accelerator: Accelerator,
        loader: Loader,
        probe: OnlineProbe | None,
        resumed: Path | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.accelerator = accelerator
        self.loader = loader
        self.probe = probe
        self.learning_rates = schedules.learning_rate(
            plan.peak_learning_rate,
            plan.total_steps,
            warmup_steps=round(config.schedule.warmup_epochs * plan.steps_per_epoch),
            shape=config.schedule.name,
            end=config.schedule.end_lr,
        )
        decay = config.optim.weight_decay
        self.weight_decays = schedules.half_cosine(
            decay, decay * config.schedule.end_weight_decay, plan.total_steps
        )
        self.inner_rates = schedules.inner_learning_rate(
            config.gessl.inner_lr, self.learning_rates, shape=config.gessl.inner_lr_schedule
        )
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        objective = build_objective(config, plan, filled_later=resumed is not None)
        self.method = objective.method
        self.objective: nn.Module
        if config.train.sharding == "fsdp":
            # Device and autocast, without DDP.
            objective = accelerator.prepare_model(objective, evaluation_mode=True)
            # Both run the method at weights of their own inside one forward, and so need all of them
            # gathered.
            whole = config.gessl.w_sigma > 0 or config.train.gradient_cache > 0
            self.objective = _shard(objective, accelerator.device, plan.world_size, whole=whole)
            optimizer = build_optimizer(self.objective, config.optim, plan.peak_learning_rate)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            objective = objective.to(memory_format=torch.channels_last)
            optimizer = build_optimizer(objective, config.optim, plan.peak_learning_rate)
            self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.statistics = _BatchStatistics(self.method)
        # Weights are drawn alike on every rank; what is random during training (dropout) is not.
        set_seed(config.train.seed, device_specific=True)
        if resumed is not None:
            self.load(resumed)

    def begin_step(self) -> None:
        """Set the step's learning rate and weight decay, and remember what it consumes even if it turns out
        bad. Waits for no device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.learning_rates[self.step])
            if group["weight_decay"] > 0:
                group["weight_decay"] = float(self.weight_decays[self.step])
        self.statistics.remember()
        self.generators = _generators(self.accelerator.device)

    def gradient_norm(self) -> Tensor:
        """Norm over all gradients of the step, unscaled, () float32 on the device, the same on all ranks."""
        self.accelerator.unscale_gradients()
        return total_norm(p.grad for p in self.objective.parameters() if p.grad is not None)

    def clip_gradients(self, norm: float) -> None:
        """Shorten the gradients, of this norm together, to the longest that the configuration allows,
        together and each for itself.
        """
        optim = self.config.optim
        if optim.clip_gradient > 0:
            clip_grads_with_norm_(self.objective.parameters(), optim.clip_gradient, torch.tensor(norm))
        if optim.clip_gradient_each > 0:
            clip_each(self.objective.parameters(), optim.clip_gradient_each)

    def save(self, run: Path) -> None:
        """Write the checkpoint before the next step. Every rank calls it; UsageError on every rank if it
        cannot be written.
        """
        if not total_norm(self.method.parameters()).isfinite():
            raise UsageError(
                f"step {self.step} left weights that are not finite, and they are not saved; the checkpoints "
                "before it are kept. Lower --optim.base_lr or --gessl.inner_lr, and continue with "
                "--train.resume auto."
            )
        state = self._state(self.loader.state_dict(), _generators(self.accelerator.device))
        self._on_main(lambda: self._write(run, state))

    def save_before_skipped(self, folder: Path, steps: int, generators: dict[str, Any]) -> Path:
        """Write a checkpoint before the first of the `steps` last steps, all of which were skipped, into a
        folder of its own; `generators` are those it started with. Returns the checkpoint.
        """
        place = self.loader.state_dict()
        batches = place["epoch"] * len(self.loader) + place["iteration"]
        batches -= steps * self.config.train.accumulate
        place["epoch"], place["iteration"] = divmod(batches, len(self.loader))
        state = self._state(place, generators)
        first = self.step + 1 - steps
        self._on_main(lambda: checkpoint.save(folder, first, state, keep=1))
        return checkpoint.folder_of(folder, first)

    def _write(self, run: Path, state: dict[str, Any]) -> None:
        lost = not (run / "config.yaml").is_file()
        if lost:
            runs.create(run, self.config, {"plan": asdict(self.plan)})
        checkpoint.save(run, self.step, state, keep=self.config.train.keep_checkpoints)
        if lost:
            raise UsageError(
                f"the run's folder '{run}' was deleted during training, and its metrics with it. The state "
                f"after step {self.step} and the configuration have been written there again. Continue with "
                f"{runs.continuation(run)}"
            )

    def _on_main(self, write: Callable[[], object]) -> None:
        """Let the first rank write; what it cannot write stops every rank with the same words."""
        problem = ""
        if self.accelerator.is_main_process:
            try:
                write()
            except UsageError as error:
                problem = str(error)
        problem = broadcast_object_list([problem])[0]
        if problem:
            raise UsageError(problem)

    def _state(self, place: dict[str, int], generators: dict[str, Any]) -> dict[str, Any]:
        """All of it, on the first rank; every rank contributes its generators and the buffers that are its
        own.
        """
        scaler = self.accelerator.scaler
        return {
            "skipped": self.skipped,
            "objective": _whole_weights(self.accelerator.unwrap_model(self.objective)),
            "optimizer": _whole_optimizer_state(self.optimizer),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "loader": place,
            "probe": self.probe.state_dict() if self.probe is not None else None,
            "ranks": gather_object([generators | {"buffers": self._own_buffers()}]),
        }

    def _own_buffers(self) -> dict[str, Tensor]:
        """This rank's buffers that differ from the first rank's, such as a queue of local keys. Batch-norm
        statistics do not count: training does not read them, and evaluation takes the first rank's."""
        if self.plan.world_size == 1:
            return {}
        own = {}
        for name, buffer in self.statistics.others():
            first = buffer.clone()
            torch.distributed.broadcast(first, src=0)
            if not torch.equal(first, buffer):
                own[name] = buffer.cpu()
        return own

    def load(self, folder: Path) -> None:
        """Restore a checkpoint. UsageError if it belongs to another model."""
        state = checkpoint.load(folder)
        try:
            _load_whole_weights(self.accelerator.unwrap_model(self.objective), state["objective"])
            _load_whole_optimizer_state(self.optimizer, state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.probe is not None and state["probe"] is not None:
                # Its optimizer would keep the mapped tensors.
                self.probe.load_state_dict(deepcopy(state["probe"]))
            if self.accelerator.process_index < len(state["ranks"]):
                rank = state["ranks"][self.accelerator.process_index]
                _restore_generators(rank, self.accelerator.device)
                with torch.no_grad():
                    for name, buffer in self.statistics.others():
                        buffer.copy_(rank["buffers"].get(name, buffer))
            if any(type(value) is not int or value < 0 for value in state["loader"].values()):
                raise ValueError("its place in the data is no place")
            self.loader.load_state_dict(state["loader"])
        except DataError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"checkpoint '{folder}' belongs to another model or optimizer than this configuration: "
                f"{reason}"
            ) from None
        self.step = state["step"]
        self.skipped = state["skipped"]

    def encoder(self) -> nn.Module:
        """The backbone, whole and callable on every rank. Collective if it is sharded."""
        if not isinstance(self.objective, FSDPModule):
            return self.method.backbone
        # Its first weights are drawn and thrown away; in the middle of training that must not move what the
        # next step draws.
        with torch.random.fork_rng(devices=[]):
            whole = build_backbone(self.config.model).to(self.accelerator.device)
        whole.load_state_dict(whole_tensors(self.method.backbone))
        return whole


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, () float32, the same on every rank if they are sharded."""
    return _whole(get_total_norm(list(tensors))).float()


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with whole tensors on every rank. Collective if they are sharded."""
    return {name: _whole(value) for name, value in module.state_dict().items()}


class _BatchStatistics:
    """The batch-norm statistics of a model, and a copy of them from before the step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        found = [
            buffer
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        # Two lists, so that each is copied by one kernel and not by one for each of some hundred buffers.
        lists = [
            [buffer for buffer in found if buffer.is_floating_point() is floating]
            for floating in (True, False)
        ]
        self._lists = [(own, [torch.empty_like(buffer) for buffer in own]) for own in lists if own]
        self._known = {id(buffer) for buffer in found}

    def remember(self) -> None:
        for own, copies in self._lists:
            torch._foreach_copy_(copies, own)

    def restore(self) -> None:
        """A forward with bad numbers leaves no trace."""
        for own, copies in self._lists:
            torch._foreach_copy_(own, copies)

    def others(self) -> list[tuple[str, Tensor]]:
        """The model's other buffers, by name."""
        return [
            (name, buffer) for name, buffer in self._model.named_buffers() if id(buffer) not in self._known
        ]


def _generators(device: torch.device) -> dict[str, Any]:
    """State of every generator that a method may draw from."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }


def _restore_generators(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _shard(objective: nn.Module, device: torch.device, world_size: int, *, whole: bool) -> nn.Module:
    """`objective` with its parameters sharded over all ranks, in place.

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
    """The members of the outermost lists of layers: residual blocks, transformer blocks, stages."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def _whole_weights(module: nn.Module) -> dict[str, Any]:
    """The module's state with whole tensors. Collective if it is sharded; only rank 0 then gets them, on the
    CPU.
    """
    if isinstance(module, FSDPModule):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return module.state_dict()


def _load_whole_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """The reverse; every rank has `weights`. Raises RuntimeError if they are another module's."""
    if isinstance(module, FSDPModule):
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def _whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors. Collective if they are sharded."""
    state = optimizer.state_dict()
    gathered = {
        index: {name: _whole(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": gathered, "param_groups": state["param_groups"]}


def _load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse; every rank has `state`. Raises ValueError if it is another optimizer's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        index: {name: _like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """A tensor of its own, sharded as the parameter is; the file that it was read from may be deleted at any
    time. ValueError if the shapes differ.
    """
    if not isinstance(value, Tensor):
        return value
    if value.dim() and value.shape != parameter.shape:
        raise ValueError(f"optimizer state {tuple(value.shape)} for a weight {tuple(parameter.shape)}")
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.clone()
