"""Training: parse → build → train → close, with one flat, visible loop over optimiser steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors.torch import save_file
from torch import Tensor

from fastgessl import checkpoint, pipelines, runs
from fastgessl.build import Plan, build_accelerator, build_loader, build_objective, make_plan, needs_fresh_views
from fastgessl.config import Config, UsageError
from fastgessl.evaluate import OnlineProbe
from fastgessl.evaluate.run import RunEvaluation
from fastgessl.objective import Result
from fastgessl.optimizers import build_optimizer, set_learning_rate
from fastgessl.pipelines import Batch, Loader
from fastgessl.progress import TrainingProgress
from fastgessl.schedules import inner_learning_rate, learning_rate
from fastgessl.signals import StopRequest


def train(config: Config) -> int:
    """Train, evaluate and write the run's folder. Returns the exit code: 0, or 128 + signal if stopped with a checkpoint written."""
    run, accelerator = _open(config)
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None  # only a test split can be absent
    loader = build_loader(config, images, accelerator)
    plan = make_plan(config, images, loader, accelerator)
    evaluation = RunEvaluation(config, images, accelerator)
    training = Training(config, plan, accelerator, loader, evaluation.probe)
    resumed = checkpoint.find(run, config.train.resume)
    first_step = training.load(resumed) if resumed else 0
    if accelerator.is_main_process:
        _describe(run, config, plan, resumed)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")

    with StopRequest() as stop:
        stopped_at = _steps(training, evaluation, run, first_step, stop)
    loader.close()
    if stopped_at < plan.total_steps:
        accelerator.print(
            f"stopped by {stop.name} after step {stopped_at} of {plan.total_steps}; a checkpoint is written. Continue with:\n"
            f"  fastgessl train {run / 'config.yaml'} --train.run_dir {run} --train.resume auto"
        )
        accelerator.end_training()
        return stop.exit_code
    if accelerator.is_main_process:
        save_file(training.encoder_weights(), run / "encoder.safetensors")
    evaluation.finish(training.method.backbone, run, facts={"steps": stopped_at, "plan": dataclasses.asdict(plan)})
    accelerator.end_training()
    return 0


def _steps(training: Training, evaluation: RunEvaluation, run: Path, first_step: int, stop: StopRequest) -> int:
    """Every optimiser step from `first_step` on; returns the number of steps done, which is smaller than planned after a stop request."""
    config, plan, accelerator = training.config, training.plan, training.accelerator
    warmup_steps = round(config.schedule.warmup_epochs * plan.steps_per_epoch)
    rates = learning_rate(
        plan.peak_learning_rate, plan.total_steps, warmup_steps=warmup_steps, shape=config.schedule.name, end=config.schedule.end_lr
    )
    alphas = inner_learning_rate(config.gessl.inner_lr, rates, shape=config.gessl.inner_lr_schedule)
    save_every = config.train.checkpoint_every or max(round(plan.steps_per_epoch), 1)
    evaluate_every = round(config.evaluate.every_epochs * plan.steps_per_epoch)
    batches = _endless(training.loader)
    step = first_step
    with MetricsLog(training, run, first_step) as log:
        while step < plan.total_steps:
            set_learning_rate(training.optimizer, float(rates[step]))
            results = []
            for _ in range(config.train.accumulate):
                batch = next(batches)
                views, query_views = _split(batch, config)
                with accelerator.accumulate(training.objective):
                    result = training.objective(views, step, query_views, float(alphas[step]), batch.label)
                    accelerator.backward(result.loss)
                evaluation.observe(result.outputs, batch.label)
                results.append(result)
            for parameter in training.method.frozen(step):
                parameter.grad = None
            if config.optim.clip_gradient > 0:
                accelerator.clip_grad_norm_(training.objective.parameters(), config.optim.clip_gradient)
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)
            training.method.update_state([(result.outputs, result.targets) for result in results], step)
            step += 1

            saving = step % save_every == 0 or step == plan.total_steps
            stopping = log.write(step, results, float(rates[step - 1]), stop, due=saving or step % config.log.every == 0)
            if evaluate_every and step % evaluate_every == 0:
                log.note(step, evaluation.during_training(training.method.backbone))
            if stopping or saving:
                training.save(run, step)
            if stopping:
                break
    return step


class Training:
    """The parts of a run that a checkpoint must restore: objective, optimiser, scaler, loader, online probe, random states."""

    def __init__(self, config: Config, plan: Plan, accelerator: Accelerator, loader: Loader, probe: OnlineProbe | None) -> None:
        self.config, self.plan, self.accelerator, self.loader, self.probe = config, plan, accelerator, loader, probe
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        objective = build_objective(config, plan).to(memory_format=torch.channels_last)
        self.method = objective.method
        optimizer = build_optimizer(objective, config.optim, plan.peak_learning_rate)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        # Weights are drawn alike on every rank; what is random during training (dropout) is not.
        set_seed(config.train.seed, device_specific=True)

    def save(self, run: Path, step: int) -> None:
        """Write the checkpoint before optimiser step `step`; every rank contributes its random state."""
        random = [torch.get_rng_state(), torch.cuda.get_rng_state() if self.accelerator.device.type == "cuda" else None]
        random_states = gather_object([random])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "objective": self.accelerator.unwrap_model(self.objective).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "loader": self.loader.state_dict(),
                "probe": self.probe.state_dict() if self.probe is not None else None,
                "random": random_states,
            }
            checkpoint.save(run, step, state, keep=self.config.train.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> int:
        """Restore a checkpoint; returns the step it was written before. UsageError if it belongs to another model."""
        state = checkpoint.load(folder)
        try:
            self.accelerator.unwrap_model(self.objective).load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"checkpoint '{folder}' belongs to another model or optimiser than this configuration: {reason}") from None
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.probe is not None and state["probe"] is not None:
            self.probe.load_state_dict(state["probe"])
        self.loader.load_state_dict(state["loader"])
        if self.accelerator.process_index < len(state["random"]):
            cpu, cuda = state["random"][self.accelerator.process_index]
            torch.set_rng_state(cpu)
            if cuda is not None and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(cuda)
        return state["step"]

    def encoder_weights(self) -> dict[str, Tensor]:
        """The backbone's weights by timm's names, for safetensors."""
        return {name: value.detach().cpu().contiguous() for name, value in self.method.backbone.state_dict().items()}


class MetricsLog:
    """metrics.jsonl, timing.jsonl, trackers and the progress bar; the only place where a step waits for the device."""

    def __init__(self, training: Training, run: Path, first_step: int) -> None:
        self._training = training
        main = training.accelerator.is_main_process
        self._metrics = runs.JsonLines(run / "metrics.jsonl", first_step + 1, enabled=main)
        self._timing = runs.JsonLines(run / "timing.jsonl", first_step + 1, enabled=main)
        self._progress = TrainingProgress(training.plan.total_steps, first_step, enabled=main)
        self._since, self._since_step = time.perf_counter(), first_step

    def __enter__(self) -> MetricsLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._metrics.close()
        self._timing.close()

    def write(self, step: int, results: Sequence[Result], rate: float, stop: StopRequest, *, due: bool) -> bool:
        """Log finished step `step` if it is due; returns True if some rank was asked to stop. Raises UsageError if the loss is not finite,
        and every step that is saved is due, so that no checkpoint holds such a state."""
        training = self._training
        if not due:
            return bool(stop) and training.plan.world_size == 1
        names = ["loss", *sorted(results[0].metrics)]
        columns = [torch.stack([_metric(result, name) for result in results]).mean() for name in names]
        asked = torch.tensor(float(bool(stop)), device=columns[0].device)
        *values, stopping = training.accelerator.reduce(torch.stack([*columns, asked]), "mean").tolist()
        metrics = dict(zip(names, values, strict=True))
        if not all(torch.isfinite(torch.tensor(values))):
            raise UsageError(
                f"step {step} gave {metrics}, and nothing after it would mean anything. Lower --optim.base_lr or --gessl.inner_lr, "
                "or train with --train.precision fp32; the checkpoints before it are kept."
            )
        epoch = step / training.plan.steps_per_epoch
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        throughput = (step - self._since_step) * training.config.train.batch_size / seconds
        self._since_step = step
        self._metrics.write({"step": step, "epoch": epoch, "lr": rate} | metrics)
        self._timing.write({"step": step, "seconds": seconds, "images_per_second": throughput})
        self._progress.update(step, metrics, throughput)
        training.accelerator.log(metrics | {"lr": rate, "epoch": epoch}, step=step)
        return stopping > 0

    def note(self, step: int, values: dict[str, Any]) -> None:
        """Log what was measured between two steps, such as k-NN accuracy; nothing can be without labels."""
        if values:
            self._metrics.write({"step": step} | values)
            self._training.accelerator.log(values, step=step)
        self._since, self._since_step = time.perf_counter(), step


def _metric(result: Result, name: str) -> Tensor:
    return (result.loss if name == "loss" else result.metrics[name]).detach().float()


def _endless(loader: Loader) -> Iterator[Batch]:
    """The loader's epochs, one after the other."""
    while True:
        yield from loader


def _split(batch: Batch, config: Config) -> tuple[list[Tensor], list[Tensor] | None]:
    """(views of the inner steps, further views on which sigma is measured, if asked for)."""
    if not needs_fresh_views(config):
        return batch.views, None
    half = len(batch.views) // 2
    return batch.views[:half], batch.views[half:]


def _open(config: Config) -> tuple[Path, Accelerator]:
    """The run's folder, alike on all ranks, and the processes. Nothing is written before every rank has found its arguments right."""
    folder = runs.run_folder(config)
    checkpoint.find(folder, config.train.resume)
    accelerator = build_accelerator(config, folder)
    agreed = broadcast_object_list([folder])[0]
    accelerator.project_configuration.set_directories(str(agreed))
    accelerator.wait_for_everyone()
    return agreed, accelerator


def _describe(run: Path, config: Config, plan: Plan, resumed: Path | None) -> None:
    """Write config.yaml and environment.json, and say what is about to happen."""
    if resumed is None:
        repeatable = config.model_copy(update={"train": config.train.model_copy(update={"run_dir": None, "resume": "never"})})
        runs.create(run, repeatable, {"plan": dataclasses.asdict(plan)})
    else:
        runs.write_json(run / f"environment-{resumed.name}.json", runs.environment() | {"plan": dataclasses.asdict(plan)})
    batch, optim = config.train.batch_size, config.optim
    per_rank = plan.images_per_forward // plan.world_size
    scaling = f"base {optim.base_lr:g} x {batch} / 256" if optim.lr_scaling == "linear" else "not scaled"
    print(
        f"{config.recipe}: {plan.images} images, {plan.total_steps} steps of {batch} images ({plan.steps_per_epoch:g} an epoch)\n"
        f"  processes      {plan.world_size}, each {per_rank} images a forward pass x {config.train.accumulate}, {plan.precision}\n"
        f"  learning rate  {plan.peak_learning_rate:g} ({scaling}), {optim.name}\n"
        f"  views          engine {plan.engine}: {plan.engine_reason}\n"
        f"  objective      {_objective_line(config)}; batch norm {plan.batch_norm}, negatives {plan.negatives}\n"
        f"  folder         {run}" + (f", continued from {resumed.name}" if resumed else ""),
        flush=True,
    )


def _objective_line(config: Config) -> str:
    gessl = config.gessl
    if gessl.w_sigma == 0:
        return f"{config.method.name}, plain"
    alpha = f"{gessl.inner_lr:g}" + {"constant": "", "cosine": " (cosine)", "times_lr": " x learning rate"}[gessl.inner_lr_schedule]
    return (
        f"GeSSL over {config.method.name}: K {gessl.inner_steps}, lambda {gessl.target_steps}, alpha {alpha}, "
        f"{gessl.hypergradient}, scope {gessl.scope}, sigma on every {gessl.every}. step with weight {gessl.w_sigma:g}"
    )
