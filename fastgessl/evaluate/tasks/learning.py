"""Learning universality: how far the model after K steps on a task is from its converged, task-specific copy,
along a run's checkpoints.

"Explicitly Modeling Universality into Self-Supervised Learning", arXiv 2405.01053v4. The tasks are held-out
mini-batches, the same ones with the same views at every checkpoint. α is constant, so that a falling σ is not
a decaying rate.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgessl.build import build_model, make_plan
from fastgessl.config import GesslConfig, UsageError
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.features import with_progress
from fastgessl.evaluate.sources import Source, subset
from fastgessl.evaluate.tables import Table
from fastgessl.evaluate.tasks.base import EvaluationTask, Work, register
from fastgessl.methods import Method
from fastgessl.objective.inner import Iterate, Sgd, as_leaves, descend
from fastgessl.objective.sigma import sigma
from fastgessl.objective.task import Task, adapted_weights, rank_local_task
from fastgessl.runs import checkpoint

# The copy has converged once so many steps change the loss by less than a hundredth of what all of them have
# lowered it.
STRIDE = 10
CONVERGED_SHARE = 0.01


def adapt(
    method: Method,
    settings: GesslConfig,
    views: Sequence[Tensor],
    labels: Tensor | None = None,
    max_steps: int = 50,
) -> dict[str, Any]:
    """σ, mean KL(π of the copy ‖ π of the model) in nats, between the model after K (`inner_steps`) steps on
    the task of these views and its copy after as many more `steps` as convergence takes; loss_before at the
    model itself and loss_after at the copy. Not converged is a copy that was still improving at `max_steps`.

    The method is used in training mode and left as it was. Raises UsageError if the loss does not stay
    finite.
    """
    method.check_views(views, labels)
    mode = method.training
    method.train()
    try:
        with (
            torch.random.fork_rng(devices=[views[0].device] if views[0].device.type == "cuda" else []),
            torch.enable_grad(),
        ):
            task = rank_local_task(method, views, labels, settings.scope)
            sgd = Sgd(settings.inner_lr, settings.inner_momentum)
            start = Iterate(as_leaves(adapted_weights(method, settings.scope)))
            # As in training: what the first outputs determine, such as SwAV's codes, stays as it is while the
            # weights move.
            task = task.settled(task.outputs(start.weights))
            student = descend(task, sgd, start, settings.inner_steps)[-1]
            losses = [_loss(task, start)]
            teacher, steps, converged = student, 0, False
            while steps < max_steps and not converged:
                teacher = descend(task, sgd, teacher, min(STRIDE, max_steps - steps))[-1]
                steps = min(steps + STRIDE, max_steps)
                losses.append(_loss(task, teacher))
                converged = abs(losses[-2] - losses[-1]) < CONVERGED_SHARE * (losses[0] - losses[-1])
            with torch.no_grad():
                found = sigma(
                    task.similarity(task.outputs(student.weights)),
                    task.similarity(task.outputs(teacher.weights)),
                ).item()
    finally:
        method.train(mode)
    if not np.isfinite([found, *losses]).all():
        raise UsageError(
            f"Task learning: the task-specific copy diverged (loss {losses[-1]:g}) at gessl.inner_lr "
            f"{settings.inner_lr:g}. Choose a smaller "
            "--gessl.inner_lr."
        )
    return {
        "sigma": found,
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "steps": steps,
        "converged": converged,
    }


def along_checkpoints(work: Work) -> list[dict[str, Any]]:
    """Learning universality at checkpoints that a run has kept, evenly spread: step, σ with its deviation
    (n − 1; 0 for one) over tasks, the mean losses, and how many of the tasks' copies converged. UsageError
    without any.
    """
    run, source, extractor = work.folder, work.sources[0], work.extractor
    kept = checkpoint.complete(run)
    if not kept:
        raise UsageError(
            f"Task learning: '{run}' has no checkpoints. Train with --train.keep_checkpoints 100 to keep "
            "those of the whole run; a timm model or a file of weights has none."
        )
    config = extractor.config
    places = np.linspace(0, len(kept) - 1, min(config.evaluate.learning_checkpoints, len(kept)))
    folders = [kept[place] for place in places.round().astype(int)]
    tasks = _held_out_tasks(source, extractor)
    loader = extractor.loader(source.train, [extractor.still], sharded=False)
    plan = make_plan(config, source.train, loader, extractor.accelerator)
    method = build_model(config, plan, filled_later=True).to(extractor.accelerator.device)
    loader.close()
    points = []
    for folder in with_progress(folders, "learning universality", extractor.progress):
        state = checkpoint.load(folder)
        weights = {
            name.removeprefix("method."): value
            for name, value in state["objective"].items()
            if name.startswith("method.")
        }
        try:
            method.load_state_dict(weights)
        except RuntimeError as error:
            raise UsageError(
                f"checkpoint '{folder}' does not fit method.name {config.method.name}: {str(error)[:200]}"
            ) from None
        found = [
            adapt(method, config.gessl, views, labels, config.evaluate.converged_steps)
            for views, labels in tasks
        ]
        sigmas = [each["sigma"] for each in found]
        points.append(
            {
                "step": state["step"],
                "sigma": float(np.mean(sigmas)),
                "deviation": float(np.std(sigmas, ddof=1)) if len(found) > 1 else 0.0,
                "loss_before": float(np.mean([each["loss_before"] for each in found])),
                "loss_after": float(np.mean([each["loss_after"] for each in found])),
                "converged": sum(each["converged"] for each in found),
                "tasks": len(found),
            }
        )
    return points


def _held_out_tasks(source: Source, extractor: Extractor) -> list[tuple[list[Tensor], Tensor | None]]:
    """The first held-out mini-batches, as training views: of the size of training's, or of all held-out
    images if they are fewer.
    """
    config = extractor.config
    images = source.train if source.test is None else source.test
    size = min(config.train.batch_size // config.train.accumulate, len(images))
    wanted = min(config.evaluate.learning_tasks, len(images) // size)
    order = np.random.default_rng(config.train.seed).permutation(len(images))[: wanted * size]
    with closing(extractor.training_views(subset(images, order), size)) as loader:
        return [(batch.views, batch.label) for batch in loader]


def _loss(task: Task, at: Iterate) -> float:
    with torch.no_grad():
        return task.loss(task.outputs(at.weights)).item()


def _tables(measured: list[dict[str, Any]]) -> list[Table]:
    rows = [
        [
            str(point["step"]),
            f"{point['sigma']:.4f}±{point['deviation']:.4f}",
            f"{point['loss_before']:.3f}",
            f"{point['loss_after']:.3f}",
            f"{point['converged']} of {point['tasks']}",
        ]
        for point in measured
    ]
    count = measured[0]["tasks"]
    return [
        Table(
            ["step", "σ", "SSL loss\nhere", "SSL loss\nof the copy", "copies\nconverged"],
            rows,
            f"Learning universality on {count} held-out mini-batches: σ to the task-specific copy, nats",
        )
    ]


register(
    EvaluationTask(
        "learning",
        along_checkpoints,
        tables=_tables,
        place=(4, 2),
        needs_labels=False,
        needs_checkpoints=True,
    )
)
