"""Training: parse → build → train → close, with one flat, visible loop over optimiser steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from fastgessl import pipelines, runs
from fastgessl.build import Plan, build_loader, make_plan, needs_fresh_views
from fastgessl.config import Config
from fastgessl.distributed import build_accelerator
from fastgessl.evaluate.run import RunEvaluation, trained_on
from fastgessl.fit import as_chosen_before, fit_to_images, leaves_open
from fastgessl.pipelines import Batch, Loader
from fastgessl.runs import checkpoint
from fastgessl.schedules import inner_learning_rate, learning_rate, weight_decay
from fastgessl.training.health import FiniteGuard, poisoned
from fastgessl.training.log import MetricsLog
from fastgessl.training.optimizers import set_learning_rate, set_weight_decay
from fastgessl.training.progress import opening_lines
from fastgessl.training.signals import StopRequest
from fastgessl.training.state import Training


def train(config: Config) -> int:
    """Train, evaluate and write the run's folder. Returns the exit code: 0, or 128 + signal if stopped with a
    checkpoint written.
    """
    folder = runs.run_folder(config)
    checkpoint.find(folder, config.train.resume)
    run, accelerator = _open(config, folder)
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None  # only a test split can be absent
    resumed = checkpoint.find(run, config.train.resume)
    earlier = _earlier_config(config, run, resumed)
    seen = trained_on(config, images)
    config = _fitted(config, earlier, len(seen), accelerator)
    if len(seen) < len(images):
        accelerator.print(
            f"held out: {len(images) - len(seen)} of {len(images)} images, to be judged on; there is no "
            "test split."
        )
    loader = build_loader(config, seen, accelerator)
    plan = make_plan(config, seen, loader, accelerator)
    evaluation = RunEvaluation(config, images, accelerator)
    training = Training(config, plan, accelerator, loader, evaluation.probe, filled_later=resumed is not None)
    first_step = training.load(resumed) if resumed else 0
    if accelerator.is_main_process:
        _describe(run, config, plan, resumed, first_step, earlier)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("fastgessl", config=runs.hyperparameters(config))

    with StopRequest() as stop:
        stopped_at = _steps(training, evaluation, run, first_step, stop)
    loader.close()
    if stopped_at < plan.total_steps:
        accelerator.print(
            f"stopped by {stop.name} after step {stopped_at} of {plan.total_steps}; a checkpoint is "
            "written. Continue with:\n"
            f"  {runs.continuation(run)}"
        )
        accelerator.end_training()
        return stop.exit_code
    _finish(training, evaluation, run, stopped_at)
    accelerator.end_training()
    return 0


def _finish(training: Training, evaluation: RunEvaluation, run: Path, steps: int) -> None:
    """Write the encoder and what it has learned."""
    accelerator, plan = training.accelerator, training.plan
    if training.skipped:
        accelerator.print(
            f"{training.skipped} of {plan.total_steps} steps were skipped because their loss or gradient "
            "was not finite."
        )
    encoder = training.encoder()
    if accelerator.is_main_process:
        weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
        runs.write_bytes(run / "encoder.safetensors", safetensors.torch.save(weights))
    evaluation.finish(encoder, run, facts={"steps": steps, "plan": dataclasses.asdict(plan)})


def _steps(
    training: Training, evaluation: RunEvaluation, run: Path, first_step: int, stop: StopRequest
) -> int:
    """Every optimiser step from `first_step` on; returns the number of steps done, which is smaller than
    planned after a stop request.
    """
    config, plan, accelerator = training.config, training.plan, training.accelerator
    warmup_steps = round(config.schedule.warmup_epochs * plan.steps_per_epoch)
    rates = learning_rate(
        plan.peak_learning_rate,
        plan.total_steps,
        warmup_steps=warmup_steps,
        shape=config.schedule.name,
        end=config.schedule.end_lr,
    )
    decays = weight_decay(config.optim.weight_decay, plan.total_steps, end=config.schedule.end_weight_decay)
    alphas = inner_learning_rate(config.gessl.inner_lr, rates, shape=config.gessl.inner_lr_schedule)
    save_every = config.train.checkpoint_every or max(round(plan.steps_per_epoch), 1)
    evaluate_every = round(config.evaluate.every_epochs * plan.steps_per_epoch)
    batches = _endless(training.loader)
    guard = FiniteGuard(training, run, config.train.nonfinite_limit)
    step = first_step
    with MetricsLog(training, run, first_step) as log:
        while step < plan.total_steps:
            set_learning_rate(training.optimizer, float(rates[step]))
            set_weight_decay(training.optimizer, float(decays[step]))
            guard.remember(step)
            last = step + 1 == plan.total_steps
            saving = last or (step + 1) % save_every == 0
            due = saving or (step + 1) % log.every == 0
            results, shown = [], []
            for _ in range(config.train.accumulate):
                batch = next(batches)
                views, query_views = _split(batch, config)
                with accelerator.accumulate(training.objective):
                    result = training.objective(
                        views, step, query_views, float(alphas[step]), batch.label, measured=due
                    )
                    accelerator.backward(poisoned(result.loss))
                results.append(result)
                shown.append((batch.label, batch.index))
            for parameter in training.method.frozen(step):
                parameter.grad = None
            reading = log.read(results, stop, due=due)
            passed = guard.passes(reading.gradient_norm, results)
            if passed:
                training.clip_gradients(reading.gradient_norm)
                training.optimizer.step()
                training.method.update_state([(result.outputs, result.targets) for result in results], step)
                for result, (label, index) in zip(results, shown, strict=True):
                    evaluation.observe(result.outputs, label, index)
            training.optimizer.zero_grad(set_to_none=True)
            step += 1

            log.write(step, reading, float(rates[step - 1]), skipped=not passed)
            if evaluate_every and step % evaluate_every == 0:
                log.note(step, evaluation.during_training(training.encoder()))
            # Saving while steps are skipped could push out the checkpoints from before the trouble.
            if reading.stopping or last or (saving and passed):
                training.save(run, step)
            if reading.stopping:
                break
    return step


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


def _open(config: Config, folder: Path) -> tuple[Path, Accelerator]:
    """The run's folder, alike on all ranks, and the processes."""
    accelerator = build_accelerator(config, folder)
    agreed = broadcast_object_list([folder])[0]
    accelerator.project_configuration.set_directories(str(agreed))
    return agreed, accelerator


def _earlier_config(config: Config, run: Path, resumed: Path | None) -> Config | None:
    """What a run that is continued was started with: this folder's configuration, or, if something is left
    open, that of the run whose checkpoint is given."""
    if resumed is None:
        return None
    folders = (run, resumed.parent.parent) if leaves_open(config) else (run,)
    return next((runs.read_config(folder) for folder in folders if (folder / "config.yaml").is_file()), None)


def _fitted(config: Config, earlier: Config | None, images: int, accelerator: Accelerator) -> Config:
    """`config` with what it leaves open filled in, as in the run that is continued, or from the number of
    images; the latter is said.
    """
    kept = as_chosen_before(config, earlier) if earlier else config
    fitted, reasons = fit_to_images(kept, images, accelerator.num_processes * config.train.accumulate)
    accelerator.print("".join(f"chosen: {reason}\n" for reason in reasons), end="")
    return fitted


def _describe(
    run: Path, config: Config, plan: Plan, resumed: Path | None, first_step: int, earlier: Config | None
) -> None:
    """Write config.yaml and environment.json, leave no later steps in the way, and say what is about to
    happen.
    """
    facts = {"plan": dataclasses.asdict(plan)}
    if resumed and (branch := checkpoint.set_aside(run, resumed, first_step)):
        print(
            f"set aside: what this run did after step {first_step}. It can go on too:\n  "
            f"{runs.continuation(branch)}"
        )
    if resumed is None or earlier is None or not (run / "config.yaml").is_file():
        runs.create(run, config, facts)
    else:
        runs.write_json(run / f"environment-{resumed.name}.json", runs.environment() | facts)
        print(
            "".join(
                f"changed: {change}\n" for change in runs.record_changes(run, earlier, config, resumed.name)
            ),
            end="",
        )
    print(opening_lines(config, plan, run, resumed), flush=True)
