"""σ of a task as a function of the present weights: inner steps to a student, further steps to its
self-motivated target, KL between them.

Equations in docs/gessl.md, after arXiv 2405.01053v4.
"""

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class LookAhead:
    """What a look ahead needs beside the weights: settings, inner steps, the task that they are taken on, and
    the task on which σ is measured, which may be the same one.
    """

    settings: GesslConfig
    sgd: Sgd
    task: Task
    query: Task

    @property
    def same(self) -> bool:
        """Whether σ is measured on the task of the inner steps."""
        return self.query is self.task


def bi_level_sigma(
    ahead: LookAhead, weights: Weights, first: Outputs, loss: Tensor, *, loss_needs_graph: bool
) -> Measured:
    """σ at `weights` θ, where `first` are the task's outputs and `loss` its SSL loss.

    `loss_needs_graph`: whether someone else will run back through `first`, whose graph is otherwise freed as
    soon as it can be.
    """
    settings, task = ahead.settings, ahead.task
    adapts = settings.inner_steps > 0
    graph_of_steps = keeps_graph(settings)
    if second_order(settings):
        check_graph(loss, task.inputs.values())
    gradient = gradient_of(
        loss, weights, create_graph=graph_of_steps, retain_graph=loss_needs_graph or not adapts
    )
    if not adapts:
        value, delta = _against_target(ahead, Iterate(weights), first, loss, gradient)
    elif settings.hypergradient == "first_order" or graph_of_steps:
        student = _student(ahead, weights, gradient)
        value, delta = _against_target(ahead, student, task.outputs(student.weights), loss)
    else:
        value, delta = _step_by_step(ahead, weights, loss, gradient)
    return Measured(value, delta, gradient)


def _student(ahead: LookAhead, weights: Weights, gradient: Weights) -> Iterate:
    """θ_K as a function of θ: through every inner step (exact), or θ + stopgrad(Δ) (first order)."""
    task, sgd, steps = ahead.task, ahead.sgd, ahead.settings.inner_steps
    if ahead.settings.hypergradient == "exact":
        return descend(task, sgd, Iterate(weights), steps, gradient=gradient, create_graph=True)[-1]
    student = descend(task, sgd, Iterate(as_leaves(weights)), steps, gradient=gradient)[-1]
    return Iterate(shifted(weights, student.weights), student.velocity)


def _against_target(
    ahead: LookAhead, student: Iterate, out: Outputs, loss: Tensor, gradient: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """σ () of the student, whose outputs on the task are `out`, against the target λ steps further on; and ΔL
    ().
    """
    task, query, same = ahead.task, ahead.query, ahead.same
    if gradient is None:
        gradient = gradient_of(task.loss(out), student.weights, retain_graph=same)
    constant, steps = task.cut_off(), ahead.settings.target_steps
    target = descend(constant, ahead.sgd, student.cut_off(), steps, gradient=gradient)[-1].weights
    with torch.no_grad():
        target_out = constant.outputs(target)
        delta = task.loss(target_out) - loss
        target_pi = query.similarity(target_out if same else query.cut_off().outputs(target))
    return sigma(query.similarity(out if same else query.outputs(student.weights)), target_pi), delta


def _step_by_step(
    ahead: LookAhead, weights: Weights, loss: Tensor, gradient: Weights
) -> tuple[Tensor, Tensor]:
    """σ () and ΔL (), with a hypergradient that never holds the graph of more than one inner step."""
    settings, sgd, task, query = ahead.settings, ahead.sgd, ahead.task, ahead.query
    adapting = task.cut_off(requires_grad=True)
    seeing = adapting if ahead.same else query.cut_off(requires_grad=True)
    trajectory = descend(adapting, sgd, Iterate(as_leaves(weights)), settings.inner_steps, gradient=gradient)
    student = trajectory[-1]
    inner = replace(ahead, task=adapting, query=seeing)
    value, delta = _against_target(inner, student, adapting.outputs(student.weights), loss)
    direct = gradient_of(value, student.weights | seeing.inputs)
    slope = direct
    if not ahead.same:
        slope = {name: direct[name] for name in weights} | {
            name: torch.zeros_like(h) for name, h in adapting.inputs.items()
        }
    product = exact_product if settings.hypergradient == "exact" else difference_product
    carried = carried_back(adapting, sgd, trajectory, slope, product)
    origins, slopes = list((weights | task.inputs).values()), list(carried.values())
    if not ahead.same:
        origins += query.inputs.values()
        slopes += [direct[name] for name in query.inputs]
    return attach_gradients(value, origins, slopes), delta
