"""Everything that the next optimiser step depends on, in one place: what is saved, what is restored, what a
bad step must give back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_

from fastgessl import runs
from fastgessl.build import Plan, build_objective
from fastgessl.config import Config, UsageError
from fastgessl.evaluate import OnlineProbe
from fastgessl.models import build_backbone
from fastgessl.pipelines import DataError, Loader
from fastgessl.runs import checkpoint
from fastgessl.training.optimizers import build_optimizer, clip_each
from fastgessl.training.sharding import (
    is_sharded,
    load_whole_optimizer_state,
    load_whole_weights,
    shard,
    total_norm,
    whole_optimizer_state,
    whole_tensors,
    whole_weights,
)


@dataclass(frozen=True)
class Moment:
    """Where a rank stood before a step: what the step consumes whatever comes of it."""

    step: int
    loader: dict[str, int]
    generators: dict[str, Any]


class Training:
    """The parts of a run that a checkpoint must restore: objective, optimiser, scaler, loader, online probe,
    random states.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        accelerator: Accelerator,
        loader: Loader,
        probe: OnlineProbe | None,
        *,
        filled_later: bool = False,
    ) -> None:
        self.config, self.plan, self.accelerator, self.loader, self.probe = (
            config,
            plan,
            accelerator,
            loader,
            probe,
        )
        self.skipped = 0
        self.symptoms: dict[str, dict[str, Any]] = {"seen": {}, "readings": {}}
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        objective = build_objective(config, plan, filled_later=filled_later)
        self.method = objective.method
        self.objective: nn.Module
        if config.train.sharding == "fsdp":
            objective = accelerator.prepare_model(
                objective, evaluation_mode=True
            )  # device and autocast, without DDP
            # Both run the method at weights of their own inside one forward, and so need all of them
            # gathered.
            whole = config.gessl.w_sigma > 0 or config.train.gradient_cache > 0
            self.objective = shard(objective, accelerator.device, plan.world_size, whole=whole)
            self.optimizer = accelerator.prepare(
                build_optimizer(self.objective, config.optim, plan.peak_learning_rate)
            )
        else:
            objective = objective.to(memory_format=torch.channels_last)
            optimizer = build_optimizer(objective, config.optim, plan.peak_learning_rate)
            self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self._statistics = _Statistics(self.method)
        # Weights are drawn alike on every rank; what is random during training (dropout) is not.
        set_seed(config.train.seed, device_specific=True)

    def moment(self, step: int) -> Moment:
        """Remember where step `step` starts from. Waits for no device."""
        self._statistics.remember()
        return Moment(step, self.loader.state_dict(), _generators(self.accelerator.device))

    def forget_forward(self) -> None:
        """Batch-norm statistics as they were at the last `moment`: a forward with bad numbers leaves no
        trace.
        """
        self._statistics.restore()

    def gradient_norm(self) -> Tensor:
        """Norm over all gradients of the step, unscaled, () float32 on the device, the same on all ranks."""
        self.accelerator.unscale_gradients()
        return total_norm(p.grad for p in self.objective.parameters() if p.grad is not None)

    def clip_gradients(self, norm: float) -> None:
        """Shorten the gradients, of this norm together, to the longest that the configuration allows,
        together and each for itself.
        """
        if self.config.optim.clip_gradient > 0:
            clip_grads_with_norm_(
                self.objective.parameters(), self.config.optim.clip_gradient, torch.tensor(norm)
            )
        if self.config.optim.clip_gradient_each > 0:
            clip_each(self.objective.parameters(), self.config.optim.clip_gradient_each)

    def save(self, run: Path, step: int) -> None:
        """Write the checkpoint before optimiser step `step`. Every rank calls it; UsageError on every rank if
        it cannot be written.
        """
        if not total_norm(self.method.parameters()).isfinite():
            raise UsageError(
                f"step {step} left weights that are not finite, and they are not saved; the checkpoints "
                "before it are kept. "
                "Lower --optim.base_lr or --gessl.inner_lr, and continue with --train.resume auto."
            )
        state = self._state(self.moment(step))
        self._on_main(lambda: self._write(run, step, state))

    def save_moment(self, folder: Path, moment: Moment) -> None:
        """Write a checkpoint that starts with the step of `moment`, of the weights as they are, into a folder
        of its own.
        """
        state = self._state(moment)
        self._on_main(lambda: checkpoint.save(folder, moment.step, state, keep=1))

    def _write(self, run: Path, step: int, state: dict[str, Any]) -> None:
        lost = not (run / "config.yaml").is_file()
        if lost:
            runs.create(run, self.config, {"plan": asdict(self.plan)})
        checkpoint.save(run, step, state, keep=self.config.train.keep_checkpoints)
        if lost:
            raise UsageError(
                f"the run's folder '{run}' was deleted during training, and its metrics with it. The state "
                f"after step {step} and the "
                f"configuration have been written there again. Continue with {runs.continuation(run)}"
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

    def _state(self, moment: Moment) -> dict[str, Any]:
        """All of it, on the first rank; every rank contributes its generators and the buffers that are its
        own.
        """
        ranks = gather_object([moment.generators | {"buffers": self._own_buffers()}])
        scaler = self.accelerator.scaler
        return {
            "skipped": self.skipped,
            "symptoms": self.symptoms,
            "objective": whole_weights(self.accelerator.unwrap_model(self.objective)),
            "optimizer": whole_optimizer_state(self.optimizer),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "loader": moment.loader,
            "probe": self.probe.state_dict() if self.probe is not None else None,
            "ranks": ranks,
        }

    def _own_buffers(self) -> dict[str, Tensor]:
        """This rank's buffers that differ from the first rank's, such as a queue of local keys. Batch-norm
        statistics do not count: training does not read them, and evaluation takes the first rank's."""
        if self.plan.world_size == 1:
            return {}
        own = {}
        for name, buffer in self._statistics.others():
            first = buffer.clone()
            torch.distributed.broadcast(first, src=0)
            if not torch.equal(first, buffer):
                own[name] = buffer.cpu()
        return own

    def load(self, folder: Path) -> int:
        """Restore a checkpoint; returns the step it was written before. UsageError if it belongs to another
        model.
        """
        state = checkpoint.load(folder)
        objective = self.accelerator.unwrap_model(self.objective)
        try:
            load_whole_weights(objective, state["objective"])
            load_whole_optimizer_state(self.optimizer, state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.probe is not None and state["probe"] is not None:
                self.probe.load_state_dict(
                    deepcopy(state["probe"])
                )  # its optimiser would keep the mapped tensors
            if self.accelerator.process_index < len(state["ranks"]):
                rank = state["ranks"][self.accelerator.process_index]
                _restore_generators(rank, self.accelerator.device)
                with torch.no_grad():
                    for name, buffer in self._statistics.others():
                        buffer.copy_(rank["buffers"].get(name, buffer))
            if any(type(value) is not int or value < 0 for value in state["loader"].values()):
                raise ValueError("its place in the data is no place")
            self.loader.load_state_dict(state["loader"])
        except DataError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"checkpoint '{folder}' belongs to another model or optimiser than this configuration: "
                f"{reason}"
            ) from None
        self.skipped, self.symptoms = state["skipped"], state["symptoms"]
        return state["step"]

    def encoder(self) -> nn.Module:
        """The backbone, whole and callable on every rank. Collective if it is sharded."""
        if not is_sharded(self.objective):
            return self.method.backbone
        # Its first weights are drawn and thrown away; in the middle of training that must not move what the
        # next step draws.
        with torch.random.fork_rng(devices=[]):
            whole = build_backbone(self.config.model).to(self.accelerator.device)
        whole.load_state_dict(whole_tensors(self.method.backbone))
        return whole


class _Statistics:
    """The batch-norm statistics of a model, and a copy of them."""

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
        for own, copies in self._lists:
            torch._foreach_copy_(own, copies)

    def others(self) -> list[tuple[str, Tensor]]:
        """The method's further buffers, by name."""
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
