"""Trains a configuration: build, take the steps, evaluate. `run_steps` reads from top to bottom what happens
in a step.
"""

import dataclasses
import itertools
from pathlib import Path

import safetensors.torch
from accelerate.utils import broadcast_object_list

from fastgessl import runs
from fastgessl.build import build_loader, complete, make_plan, needs_fresh_views
from fastgessl.config import Config
from fastgessl.distributed import build_accelerator
from fastgessl.evaluate.run import RunEvaluation, trained_on
from fastgessl.evaluate.sources import open_source
from fastgessl.runs import checkpoint
from fastgessl.training.health import Health, poisoned
from fastgessl.training.log import MetricsLog, opening_lines
from fastgessl.training.signals import StopRequest
from fastgessl.training.state import Training


def train(config: Config) -> int:
    """Train, evaluate and write the run's folder. Returns the exit code: 0, or 128 + signal if stopped with a
    checkpoint written.
    """
    run = runs.run_folder(config)
    resumed = None if config.train.resume == "never" else checkpoint.find(run, config.train.resume)
    accelerator = build_accelerator(config, run)
    # Ranks that start in different seconds would name different folders.
    run, resumed = broadcast_object_list([run, resumed])
    accelerator.project_configuration.set_directories(str(run))

    source = open_source(config.data.name, config.data.root)
    images, seen = source.train, trained_on(config, source)
    # What the run that the checkpoint belongs to was trained with.
    begun = resumed is not None and (resumed.parents[1] / "config.yaml").is_file()
    earlier = runs.read_config(resumed.parents[1]) if resumed and begun else None
    config, chosen = complete(config, len(seen), accelerator.num_processes, earlier)
    for line in chosen:
        accelerator.print(f"chosen: {line}")
    if len(seen) < len(images):
        accelerator.print(
            f"held out: {len(images) - len(seen)} of {len(images)} images, to be judged on; there is no test "
            "split."
        )
    loader = build_loader(config, seen, accelerator)
    plan = make_plan(config, seen, loader, accelerator)
    evaluation = RunEvaluation(config, source, accelerator)
    training = Training(config, plan, accelerator, loader, evaluation.probe, resumed)
    if accelerator.is_main_process:
        changes = runs.changes(earlier, config) if earlier else []
        continued = resumed.name if resumed and (run / "config.yaml").is_file() else ""
        facts = {"plan": dataclasses.asdict(plan), "continued_from": str(resumed), "changed": changes}
        runs.create(run, config, facts, continued)
        for change in changes:
            print(f"changed: {change}")
        print(opening_lines(config, plan, run, resumed), flush=True)
    accelerator.wait_for_everyone()
    trackable = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.options().items()
    }
    accelerator.init_trackers("fastgessl", config=trackable)

    with StopRequest() as stop:
        run_steps(training, evaluation, run, stop)
    loader.close()
    if training.step < plan.total_steps:
        accelerator.print(
            f"stopped by {stop.name} after step {training.step} of {plan.total_steps}; a checkpoint is "
            f"written. Continue with:\n  {runs.continuation(run)}"
        )
        accelerator.end_training()
        return stop.exit_code
    if training.skipped:
        accelerator.print(
            f"{training.skipped} of {plan.total_steps} steps were skipped because their loss or gradient was "
            "not finite."
        )
    encoder = training.encoder()
    if accelerator.is_main_process:
        weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
        runs.write_bytes(run / "encoder.safetensors", safetensors.torch.save(weights))
    evaluation.finish(encoder, run, facts={"steps": training.step, "plan": dataclasses.asdict(plan)})
    accelerator.end_training()
    return 0


def run_steps(training: Training, evaluation: RunEvaluation, run: Path, stop: StopRequest) -> None:
    """Take every optimizer step from `training.step` to the plan's last, or to the one in which a stop is
    asked for.
    """
    config, plan, method = training.config, training.plan, training.method
    save_every = config.train.checkpoint_every or max(round(plan.steps_per_epoch), 1)
    evaluate_every = round(config.evaluate.every_epochs * plan.steps_per_epoch)
    fresh_views = needs_fresh_views(config)
    batches = itertools.chain.from_iterable(itertools.repeat(training.loader))  # epoch after epoch
    health = Health(training, run)
    stopping = False
    with MetricsLog(training, run) as log:
        while training.step < plan.total_steps and not stopping:
            step = training.step
            last = step + 1 == plan.total_steps
            saving = last or (step + 1) % save_every == 0
            due = saving or (step + 1) % log.every == 0
            training.begin_step()
            results, shown = [], []
            for batch in itertools.islice(batches, config.train.accumulate):
                # With fresh views the loader gives twice as many, and σ is measured on the second half.
                half = len(batch.views) // 2 if fresh_views else len(batch.views)
                with training.accelerator.accumulate(training.objective):
                    result = training.objective(
                        batch.views[:half],
                        step,
                        batch.views[half:] or None,
                        float(training.inner_rates[step]),
                        batch.label,
                        measured=due,
                    )
                    training.accelerator.backward(poisoned(result.loss))
                results.append(result)
                shown.append((batch.label, batch.index))
            for parameter in method.frozen(step):
                parameter.grad = None

            reading = log.read(results, stop, due=due)
            passed = health.passes(reading, results)
            if passed:
                training.clip_gradients(reading.gradient_norm)
                training.optimizer.step()
                method.update_state([(result.outputs, result.targets) for result in results], step)
                for result, (label, index) in zip(results, shown, strict=True):
                    evaluation.observe(result.outputs, label, index)
            training.optimizer.zero_grad(set_to_none=True)
            training.step += 1

            log.write(reading, skipped=not passed)
            if evaluate_every and training.step % evaluate_every == 0:
                log.note(evaluation.during_training(training.encoder()))
            # Saving while steps are skipped could push out the checkpoints from before the trouble.
            stopping = reading.stopping
            if stopping or last or (saving and passed):
                training.save(run)
