"""σ-measurement: how far the model specialised to a task is from the model at hand, as seen on the task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgessl.config import GesslConfig
from fastgessl.kernels import sigma_kl
from fastgessl.methods.base import Method, Similarity
from fastgessl.objective.differentiable import check_sharding
from fastgessl.objective.inner import Iterate, Sgd, as_leaves, descend
from fastgessl.objective.task import adapted_weights, full_precision, rank_local_task


def sigma(student: Sequence[Similarity], teacher: Sequence[Similarity]) -> Tensor:
    """σ = mean over rows and directions of KL(π_teacher ‖ π_student), in nats; the teacher is a constant.
    Returns ().

    GeSSL (arXiv 2405.01053v4), the σ-measurement of a task.
    """
    with full_precision(student[0].query.device.type):
        directions = [
            sigma_kl(
                s.query,
                s.key,
                t.query.detach(),
                t.key.detach(),
                temperature=s.temperature,
                teacher_temperature=t.temperature,
            )
            for s, t in zip(student, teacher, strict=True)
        ]
    return torch.stack(directions).mean()


def measure_sigma(
    method: Method, settings: GesslConfig, views: Sequence[Tensor], labels: Tensor | None = None
) -> float:
    """σ of one mini-batch at the present weights, as a number in nats: for looking at a model on held-out
    images at constant α.

    K, λ, α (`inner_lr`, whatever its schedule), momentum and the scope come from `settings`. `views` are
    those that the method takes, N rows each; `labels` (N,) for one that learns from them. The method is
    measured in training mode (a task's batch statistics are part of it) and left as it was: weights, buffers,
    random state, mode and gradients.

    >>> from fastgessl.config import GesslConfig, MethodConfig, ModelConfig
    >>> from fastgessl.methods import RunFacts, build_method
    >>> from fastgessl.models import build_backbone
    >>> backbone = build_backbone(ModelConfig(stem="small", width=0.125))
    >>> method = build_method(MethodConfig(projector_hidden=16), backbone, RunFacts())
    >>> views = [torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)]
    >>> measure_sigma(method, GesslConfig(inner_lr=0.1), views) > 0
    True
    """
    method.check_views(views, labels)
    check_sharding(method)
    mode = method.training
    device = views[0].device
    method.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            task = rank_local_task(method, views, labels, settings.scope)
            sgd = Sgd(settings.inner_lr, settings.inner_momentum)
            start = Iterate(as_leaves(adapted_weights(method, settings.scope)))
            with torch.no_grad():
                task = task.settled(task.outputs(start.weights))
            student = descend(task, sgd, start, settings.inner_steps)[-1]
            teacher = descend(task, sgd, student, settings.target_steps)[-1]
            with torch.no_grad():
                return sigma(
                    task.similarity(task.outputs(student.weights)),
                    task.similarity(task.outputs(teacher.weights)),
                ).item()
    finally:
        method.train(mode)
