"""Gradient descent on a task, and what its outer gradient is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgessl.objective.task import Task, Weights, full_precision, gradient_of


def descend(
    task: Task, weights: Weights, steps: int, lr: float, *, gradient: Weights | None = None, create_graph: bool = False
) -> list[Weights]:
    """[θ_0, ..., θ_steps] with θ_{k+1} = θ_k - lr ∇L(θ_k). `gradient` is ∇L(θ_0) where it is known already.

    With `create_graph` every θ_k is a function of θ_0; otherwise each is a leaf of its own.
    """
    trajectory = [weights]
    for step in range(steps):
        if step > 0 or gradient is None:
            gradient = gradient_of(task.loss(task.outputs(weights)), weights, create_graph=create_graph)
        weights = {name: weight - lr * gradient[name] for name, weight in weights.items()}
        if not create_graph:
            weights = as_leaves(weights)
        trajectory.append(weights)
    return trajectory


def as_leaves(weights: Weights) -> Weights:
    """The same numbers without a past."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def shifted(weights: Weights, towards: Weights) -> Weights:
    """The values of `towards` with the gradient of `weights`: θ + stopgrad(Δ)."""
    return {name: weight + (towards[name] - weight).detach() for name, weight in weights.items()}


class _AttachGradients(torch.autograd.Function):
    """value () -> the same value, whose gradients with respect to tensors are given: Σ⟨θ - θ.detach(), g⟩ without the arithmetic."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(gradient * outer[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return None, None, *gradients, *(None for _ in gradients)


def attach_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A loss () of this value whose backward hands each tensor its gradient, through DDP's hooks and GradScaler like any other loss.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> (3 * attach_gradients(torch.tensor(5.0), [weight], [torch.tensor([1.0, 2.0])])).backward()
    >>> weight.grad
    tensor([3., 6.])
    """
    return _AttachGradients.apply(value.detach(), len(tensors), *tensors, *(gradient.detach() for gradient in gradients))


def central_difference(task: Task, trajectory: Sequence[Weights], slope: Weights, lr: float) -> Weights:
    """Carry ∂σ/∂θ_K back to ∂σ/∂θ_0 through the inner steps: v ← v - lr H(θ_k) v, with H v from two gradients, k = K-1 ... 0.

    `slope` holds v and ∂σ/∂ of the task's `inputs`, which gain -lr ∂⟨∇L(θ_k), v⟩/∂input.
    """
    for weights in reversed(trajectory[:-1]):
        direction = {name: slope[name] for name in weights}
        radius = _radius(weights, direction)
        ahead, behind = (
            _slopes(task, {name: weight + sign * radius * direction[name] for name, weight in weights.items()}) for sign in (1, -1)
        )
        slope = {name: v - lr * (ahead[name] - behind[name]) / (2 * radius) for name, v in slope.items()}
    return slope


def _slopes(task: Task, weights: Weights) -> Weights:
    """∇ of the loss at `weights`, with respect to them and to the task's inputs."""
    # Without autocast: the difference of two bfloat16 gradients has no correct digit.
    with full_precision(task.views[0].device.type):
        leaves = as_leaves(weights)
        return gradient_of(task.loss(task.outputs(leaves)), leaves | task.inputs)


def _radius(weights: Weights, direction: Weights) -> Tensor:
    """Step of the central difference: the cube root of the rounding error, relative to the weights' norm."""
    length, size = (torch.stack(torch._foreach_norm(list(tensors.values()))).norm() for tensors in (direction, weights))
    return torch.finfo(size.dtype).eps ** (1 / 3) * size / length.clamp_min(torch.finfo(length.dtype).tiny)
