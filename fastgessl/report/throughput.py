"""Where the time of a training step goes: making views, forward, backward, optimizer."""

import time

import numpy as np
import torch
from accelerate import Accelerator

from fastgessl.build import build_loader, build_objective, make_plan, needs_fresh_views
from fastgessl.config import Config
from fastgessl.pipelines.sources.images import Images
from fastgessl.training.optimizers import build_optimizer

# A batch of its own size, so that a CPU is done in seconds; shares hardly depend on it.
IMAGES = 64
STEPS = 4
SECONDS = 20.0
PARTS = ("views", "forward and inner steps", "backward", "optimizer")


def step_times(config: Config, images: Images, accelerator: Accelerator) -> list[dict[str, float]]:
    """Run a few training steps of this configuration, untrained weights, on this machine: for each, part of
    the step -> milliseconds per image.
    """
    size = min(IMAGES, len(images))
    train = config.train.model_copy(update={"batch_size": size, "accumulate": 1})
    small = config.model_copy(update={"train": train})
    loader = build_loader(small, images, accelerator)
    plan = make_plan(small, images, loader, accelerator)
    objective = build_objective(small, plan).to(accelerator.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(objective, small.optim, plan.peak_learning_rate)

    def now() -> float:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    found: list[dict[str, float]] = []
    started = now()
    marks = [started]
    for step, batch in enumerate(loader):
        marks.append(now())
        half = len(batch.views) // (2 if needs_fresh_views(small) else 1)
        queries = batch.views[half:] or None
        result = objective(batch.views[:half], step, queries, config.gessl.inner_lr, batch.label)
        marks.append(now())
        result.loss.backward()
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(now())
        found.append(dict(zip(PARTS, 1e3 * np.diff(marks) / size, strict=True)))
        marks = marks[-1:]
        # σ may be measured on every m-th step only: whole rounds of m steps are timed, the first step warms
        # up.
        whole = step > 0 and step % config.gessl.every == 0
        if whole and (step >= STEPS or marks[0] - started > SECONDS):
            break
    loader.close()
    return found[1:] or found


def bar(steps: list[dict[str, float]]) -> str:
    """A bar of the parts' shares with their milliseconds, as HTML."""
    parts = {part: float(np.mean([step[part] for step in steps])) for part in PARTS}
    total = sum(parts.values()) or 1.0
    pieces, legend = "", ""
    for number, (part, milliseconds) in enumerate(parts.items()):
        share = 100 * milliseconds / total
        pieces += f'<span class="c{number}" style="width:{share:.2f}%"></span>'
        text = f"{part}: {milliseconds:.3g} ms per image ({share:.0f} %)"
        legend += f'<li><span class="key c{number}"></span>{text}</li>'
    about = (
        f"Measured while this page was written: batches of at most {IMAGES} images, mean of {len(steps)} "
        "steps, untrained weights."
    )
    return f'<p>{about}</p><div class="bar">{pieces}</div><ul class="legend">{legend}</ul>'
