"""Where the time of a training step goes: making views, forward, backward, optimiser."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Split:
    """Means over steps, milliseconds an image."""

    views: float
    forward: float
    backward: float
    optimizer: float
    images: int
    """Batch it was measured with."""
    steps: int


def measure_split(config: Config, images: Images, accelerator: Accelerator) -> Split:
    """Run a few training steps of this configuration, untrained weights, on this machine."""
    # Batches of `IMAGES`, or of all images where they are fewer, in one micro-batch.
    size = min(IMAGES, len(images))
    small = config.model_copy(
        update={"train": config.train.model_copy(update={"batch_size": size, "accumulate": 1})}
    )
    loader = build_loader(small, images, accelerator)
    plan = make_plan(small, images, loader, accelerator)
    objective = build_objective(small, plan).to(accelerator.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(objective, small.optim, plan.peak_learning_rate)
    found: list[tuple[float, ...]] = []
    started, before = time.perf_counter(), time.perf_counter()
    for step, batch in enumerate(loader):
        half = len(batch.views) // (2 if needs_fresh_views(small) else 1)
        marks = [before, _now(accelerator)]
        result = objective(
            batch.views[:half], step, batch.views[half:] or None, config.gessl.inner_lr, batch.label
        )
        marks.append(_now(accelerator))
        result.loss.backward()
        marks.append(_now(accelerator))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before = _now(accelerator)
        marks.append(before)
        found.append(tuple(1e3 * (end - start) / size for start, end in itertools.pairwise(marks)))
        # σ may be measured on every m-th step only: whole rounds of m steps are timed, the first step warms
        # up.
        rounds = (len(found) - 1) % config.gessl.every == 0 and len(found) > 1
        if rounds and (len(found) > STEPS or before - started > SECONDS):
            break
    loader.close()
    timed = found[1:] or found
    views, forward, backward, update = (statistics.mean(values) for values in zip(*timed, strict=True))
    return Split(views, forward, backward, update, size, len(timed))


def _now(accelerator: Accelerator) -> float:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bar(split: Split) -> str:
    """A bar of the four shares with their milliseconds, as HTML."""
    parts = {
        "views": split.views,
        "forward and inner steps": split.forward,
        "backward": split.backward,
        "optimiser": split.optimizer,
    }
    total = sum(parts.values()) or 1.0
    widths = [100 * value / total for value in parts.values()]
    pieces = "".join(
        f'<span class="c{number}" style="width:{width:.2f}%"></span>' for number, width in enumerate(widths)
    )
    legend = "".join(
        f'<li><span class="key c{number}"></span>{name}: {value:.3g} ms an image ({100 * value / total:.0f} '
        "%)</li>"
        for number, (name, value) in enumerate(parts.items())
    )
    about = f"Measured while this page was written: batches of {split.images} images, mean of {split.steps} steps, untrained weights."
    return f'<p>{about}</p><div class="bar">{pieces}</div><ul class="legend">{legend}</ul>'
