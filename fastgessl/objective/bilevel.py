"""σ of a task as a function of the present weights: inner steps to a student, further steps to its self-motivated target, KL between them.

Equations in docs/gessl.md, after arXiv 2405.01053v4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgessl.config import GesslConfig
from fastgessl.methods.base import Outputs
from fastgessl.objective.differentiable import check_graph, second_order
from fastgessl.objective.inner import as_leaves, attach_gradients, central_difference, descend, shifted
from fastgessl.objective.sigma import sigma
from fastgessl.objective.task import Task, Weights, gradient_of


@dataclass(frozen=True)
class Measured:
    """σ () with its outer gradient, ΔL = L(θ_t) - L(θ) () without, and ∇L(θ) of the inner loss."""

    sigma: Tensor
    delta_loss: Tensor
    gradient: Weights


def bi_level_sigma(
    settings: GesslConfig, task: Task, query: Task, weights: Weights, first: Outputs, loss: Tensor, *, loss_needs_graph: bool
) -> Measured:
    """σ at `weights` θ, where `first` are the task's outputs and `loss` its SSL loss. σ is seen on `query`, which may be `task` itself.

    `loss_needs_graph`: whether someone else will run back through `first`, whose graph is otherwise freed as soon as it can be.
    """
    adapts = settings.inner_steps > 0
    if second_order(settings):
        check_graph(loss, task.inputs.values())
    gradient = gradient_of(loss, weights, create_graph=second_order(settings), retain_graph=loss_needs_graph or not adapts)
    if not adapts:
        value, delta = _against_target(settings, task, query, weights, first, loss, gradient)
    elif settings.hypergradient == "finite_difference":
        value, delta = _by_central_difference(settings, task, query, weights, loss, gradient)
    else:
        student = _student(settings, task, weights, gradient)
        value, delta = _against_target(settings, task, query, student, task.outputs(student), loss)
    return Measured(value, delta, gradient)


def _student(settings: GesslConfig, task: Task, weights: Weights, gradient: Weights) -> Weights:
    """θ_K as a function of θ: through every inner step (exact), or θ + stopgrad(Δ) (first order)."""
    steps, lr = settings.inner_steps, settings.inner_lr
    if settings.hypergradient == "exact":
        return descend(task, weights, steps, lr, gradient=gradient, create_graph=True)[-1]
    return shifted(weights, descend(task, as_leaves(weights), steps, lr, gradient=gradient)[-1])


def _against_target(
    settings: GesslConfig, task: Task, query: Task, student: Weights, out: Outputs, loss: Tensor, gradient: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """σ () of the student, whose outputs on the task are `out`, against the target λ steps further on; and ΔL ()."""
    same = query is task
    if gradient is None:
        gradient = gradient_of(task.loss(out), student, retain_graph=same)
    constant = task.cut_off()
    target = descend(constant, as_leaves(student), settings.target_steps, settings.inner_lr, gradient=gradient)[-1]
    with torch.no_grad():
        target_out = constant.outputs(target)
        delta = task.loss(target_out) - loss
        target_pi = query.similarity(target_out if same else query.cut_off().outputs(target))
    return sigma(query.similarity(out if same else query.outputs(student)), target_pi), delta


def _by_central_difference(
    settings: GesslConfig, task: Task, query: Task, weights: Weights, loss: Tensor, gradient: Weights
) -> tuple[Tensor, Tensor]:
    """σ () and ΔL (), with the hypergradient from differences of first-order gradients alone."""
    adapting = task.cut_off(requires_grad=True)
    seeing = adapting if query is task else query.cut_off(requires_grad=True)
    trajectory = descend(adapting, as_leaves(weights), settings.inner_steps, settings.inner_lr, gradient=gradient)
    student = trajectory[-1]
    value, delta = _against_target(settings, adapting, seeing, student, adapting.outputs(student), loss)
    direct = gradient_of(value, student | seeing.inputs)
    slope = direct
    if query is not task:
        slope = {name: direct[name] for name in student} | {name: torch.zeros_like(h) for name, h in adapting.inputs.items()}
    carried = central_difference(adapting, trajectory, slope, settings.inner_lr)
    origins, slopes = list((weights | task.inputs).values()), list(carried.values())
    if query is not task:
        origins += query.inputs.values()
        slopes += [direct[name] for name in query.inputs]
    return attach_gradients(value, origins, slopes), delta
