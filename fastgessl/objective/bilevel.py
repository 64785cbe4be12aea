"""σ of a task as a function of the present weights: inner steps to a student, further steps to its
self-motivated target, KL between them.

Equations in docs/gessl.md, after arXiv 2405.01053v4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgessl.config import GesslConfig
from fastgessl.methods.base import Outputs
from fastgessl.objective.differentiable import check_graph, keeps_graph, second_order
from fastgessl.objective.inner import (
    Iterate,
    Sgd,
    as_leaves,
    attach_gradients,
    carried_back,
    descend,
    difference_product,
    exact_product,
    shifted,
)
from fastgessl.objective.sigma import sigma
from fastgessl.objective.task import Task, Weights, gradient_of


@dataclass(frozen=True)
class Measured:
    """σ () with its outer gradient, ΔL = L(θ_t) - L(θ) () without, and ∇L(θ) of the inner loss."""

    sigma: Tensor
    delta_loss: Tensor
    gradient: Weights


def bi_level_sigma(
    settings: GesslConfig,
    sgd: Sgd,
    task: Task,
    query: Task,
    weights: Weights,
    first: Outputs,
    loss: Tensor,
    *,
    loss_needs_graph: bool,
) -> Measured:
    """σ at `weights` θ, where `first` are the task's outputs and `loss` its SSL loss. σ is seen on `query`,
    which may be `task` itself.

    `loss_needs_graph`: whether someone else will run back through `first`, whose graph is otherwise freed as
    soon as it can be.
    """
    adapts = settings.inner_steps > 0
    graph_of_steps = keeps_graph(settings)
    if second_order(settings):
        check_graph(loss, task.inputs.values())
    gradient = gradient_of(
        loss, weights, create_graph=graph_of_steps, retain_graph=loss_needs_graph or not adapts
    )
    if not adapts:
        value, delta = _against_target(settings, sgd, task, query, Iterate(weights), first, loss, gradient)
    elif settings.hypergradient == "first_order" or graph_of_steps:
        student = _student(settings, sgd, task, weights, gradient)
        value, delta = _against_target(
            settings, sgd, task, query, student, task.outputs(student.weights), loss
        )
    else:
        value, delta = _step_by_step(settings, sgd, task, query, weights, loss, gradient)
    return Measured(value, delta, gradient)


def _student(settings: GesslConfig, sgd: Sgd, task: Task, weights: Weights, gradient: Weights) -> Iterate:
    """θ_K as a function of θ: through every inner step (exact), or θ + stopgrad(Δ) (first order)."""
    if settings.hypergradient == "exact":
        return descend(
            task, sgd, Iterate(weights), settings.inner_steps, gradient=gradient, create_graph=True
        )[-1]
    student = descend(task, sgd, Iterate(as_leaves(weights)), settings.inner_steps, gradient=gradient)[-1]
    return Iterate(shifted(weights, student.weights), student.velocity)


def _against_target(
    settings: GesslConfig,
    sgd: Sgd,
    task: Task,
    query: Task,
    student: Iterate,
    out: Outputs,
    loss: Tensor,
    gradient: Weights | None = None,
) -> tuple[Tensor, Tensor]:
    """σ () of the student, whose outputs on the task are `out`, against the target λ steps further on; and ΔL
    ().
    """
    same = query is task
    if gradient is None:
        gradient = gradient_of(task.loss(out), student.weights, retain_graph=same)
    constant = task.cut_off()
    target = descend(constant, sgd, student.cut_off(), settings.target_steps, gradient=gradient)[-1].weights
    with torch.no_grad():
        target_out = constant.outputs(target)
        delta = task.loss(target_out) - loss
        target_pi = query.similarity(target_out if same else query.cut_off().outputs(target))
    return sigma(query.similarity(out if same else query.outputs(student.weights)), target_pi), delta


def _step_by_step(
    settings: GesslConfig,
    sgd: Sgd,
    task: Task,
    query: Task,
    weights: Weights,
    loss: Tensor,
    gradient: Weights,
) -> tuple[Tensor, Tensor]:
    """σ () and ΔL (), with a hypergradient that never holds the graph of more than one inner step."""
    adapting = task.cut_off(requires_grad=True)
    seeing = adapting if query is task else query.cut_off(requires_grad=True)
    trajectory = descend(adapting, sgd, Iterate(as_leaves(weights)), settings.inner_steps, gradient=gradient)
    student = trajectory[-1]
    value, delta = _against_target(
        settings, sgd, adapting, seeing, student, adapting.outputs(student.weights), loss
    )
    direct = gradient_of(value, student.weights | seeing.inputs)
    slope = direct
    if query is not task:
        slope = {name: direct[name] for name in weights} | {
            name: torch.zeros_like(h) for name, h in adapting.inputs.items()
        }
    product = exact_product if settings.hypergradient == "exact" else difference_product
    carried = carried_back(adapting, sgd, trajectory, slope, product)
    origins, slopes = list((weights | task.inputs).values()), list(carried.values())
    if query is not task:
        origins += query.inputs.values()
        slopes += [direct[name] for name in query.inputs]
    return attach_gradients(value, origins, slopes), delta
