"""σ-measurement: how far the model specialised to a task is from the model at hand, as seen on the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgessl.config import GesslConfig
from fastgessl.kernels import sigma_kl
from fastgessl.methods.base import Method, Similarity
from fastgessl.objective.inner import descend
from fastgessl.objective.task import adapted_weights, full_precision, rank_local_task


def sigma(student: Sequence[Similarity], teacher: Sequence[Similarity]) -> Tensor:
    """σ = mean over rows and directions of KL(π_teacher ‖ π_student), in nats; the teacher is a constant. Returns ().

    GeSSL (arXiv 2405.01053v4), the σ-measurement of a task.
    """
    with full_precision(student[0].query.device.type):
        directions = [
            sigma_kl(s.query, s.key, t.query.detach(), t.key.detach(), temperature=s.temperature, teacher_temperature=t.temperature)
            for s, t in zip(student, teacher, strict=True)
        ]
    return torch.stack(directions).mean()


def measure_sigma(method: Method, settings: GesslConfig, views: Sequence[Tensor]) -> float:
    """σ of one mini-batch at the present weights, as a number in nats: for looking at a model on held-out images at constant α.

    K, λ, α and the scope come from `settings`. `views` are V tensors (N, 3, S, S). The method is measured in training mode (a task's
    batch statistics are part of it) and left as it was: weights, buffers, random state, mode and gradients.

    >>> from fastgessl.config import GesslConfig, MethodConfig, ModelConfig
    >>> from fastgessl.methods import build_method
    >>> from fastgessl.models import build_backbone
    >>> backbone = build_backbone(ModelConfig(stem="small", width=0.125))
    >>> method = build_method(MethodConfig(projector_hidden=16), backbone, total_steps=1, negatives="local")
    >>> measure_sigma(method, GesslConfig(inner_lr=0.1), [torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)]) > 0
    True
    """
    mode = method.training
    device = views[0].device
    method.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            task = rank_local_task(method, views, settings.scope)
            weights = {name: w.detach().requires_grad_() for name, w in adapted_weights(method, settings.scope).items()}
            student = descend(task, weights, settings.inner_steps, settings.inner_lr)[-1]
            teacher = descend(task, student, settings.target_steps, settings.inner_lr)[-1]
            with torch.no_grad():
                return sigma(task.similarity(task.outputs(student)), task.similarity(task.outputs(teacher))).item()
    finally:
        method.train(mode)
