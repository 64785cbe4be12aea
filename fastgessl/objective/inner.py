"""Gradient descent on a task, and what its outer gradient is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgessl.objective.task import Task, Weights, full_precision, gradient_of


@dataclass(frozen=True)
class Sgd:
    """The inner optimiser: v' = momentum v + ∇L(θ), θ' = θ - lr v'."""

    lr: float
    momentum: float = 0.0


@dataclass(frozen=True)
class Iterate:
    """Where a descent stands: θ, and v by the same names, or empty at rest."""

    weights: Weights
    velocity: Weights = field(default_factory=dict)

    def cut_off(self) -> "Iterate":
        """The same numbers without a past; the weights are leaves."""
        return Iterate(as_leaves(self.weights), {name: v.detach() for name, v in self.velocity.items()})


def descend(
    task: Task,
    sgd: Sgd,
    start: Iterate,
    steps: int,
    *,
    gradient: Weights | None = None,
    create_graph: bool = False,
) -> list[Iterate]:
    """The iterates 0 ... steps on the task's loss L. `gradient` is ∇L at `start` where it is known already.

    With `create_graph` every iterate is a function of `start`; otherwise each is a leaf of its own.
    """
    trajectory = [start]
    for step in range(steps):
        now = trajectory[-1]
        if step > 0 or gradient is None:
            gradient = gradient_of(
                task.loss(task.outputs(now.weights)), now.weights, create_graph=create_graph
            )
        moved = _stepped(sgd, now, gradient)
        trajectory.append(moved if create_graph else moved.cut_off())
    return trajectory


def _stepped(sgd: Sgd, now: Iterate, gradient: Weights) -> Iterate:
    if sgd.momentum == 0:
        return Iterate({name: weight - sgd.lr * gradient[name] for name, weight in now.weights.items()})
    velocity = {
        name: sgd.momentum * now.velocity[name] + g if now.velocity else g for name, g in gradient.items()
    }
    return Iterate({name: weight - sgd.lr * velocity[name] for name, weight in now.weights.items()}, velocity)


def as_leaves(weights: Weights) -> Weights:
    """The same numbers without a past."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def shifted(weights: Weights, towards: Weights) -> Weights:
    """The values of `towards` with the gradient of `weights`: θ + stopgrad(Δ)."""
    return {name: weight + (towards[name] - weight).detach() for name, weight in weights.items()}


class _AttachGradients(torch.autograd.Function):
    """value () -> the same value, whose gradients with respect to tensors are given: Σ⟨θ - θ.detach(), g⟩
    without the arithmetic.
    """

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
    """A loss () of this value whose backward hands each tensor its gradient, through DDP's hooks and
    GradScaler like any other loss.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> (3 * attach_gradients(torch.tensor(5.0), [weight], [torch.tensor([1.0, 2.0])])).backward()
    >>> weight.grad
    tensor([3., 6.])
    """
    return _AttachGradients.apply(
        value.detach(), len(tensors), *tensors, *(gradient.detach() for gradient in gradients)
    )


def carried_back(
    task: Task, sgd: Sgd, trajectory: Sequence[Iterate], slope: Weights, product: "HessianProduct"
) -> Weights:
    """∂σ/∂θ_K -> ∂σ/∂θ_0 through the inner steps, one Hessian-vector product a step, k = K-1 ... 0.

    The adjoint of v' = μ v + ∇L(θ), θ' = θ - lr v': u = ∂σ/∂v' - lr ∂σ/∂θ' is ∂σ/∂∇L(θ_k); then ∂σ/∂θ =
    ∂σ/∂θ' + H(θ_k) u and ∂σ/∂v = μ u. `slope` holds ∂σ/∂θ_K and ∂σ/∂ of the task's `inputs`, which gain
    ∂⟨∇L(θ_k), u⟩/∂input.
    """
    pull = {name: torch.zeros_like(weight) for name, weight in trajectory[0].weights.items()}
    for iterate in reversed(trajectory[:-1]):
        pull = {name: sgd.momentum * pull[name] - sgd.lr * slope[name] for name in pull}
        gained = product(task, iterate.weights, pull)
        slope = {name: v + gained[name] for name, v in slope.items()}
    return slope


def exact_product(task: Task, weights: Weights, direction: Weights) -> Weights:
    """∂⟨∇L(θ), u⟩ with respect to θ and the task's inputs: a second backward through a gradient that is made
    anew.
    """
    leaves = as_leaves(weights)
    gradient = gradient_of(task.loss(task.outputs(leaves)), leaves, create_graph=True)
    along = torch.stack(
        [torch.vdot(g.flatten(), direction[name].flatten()) for name, g in gradient.items()]
    ).sum()
    return gradient_of(along, leaves | task.inputs)


def difference_product(task: Task, weights: Weights, direction: Weights) -> Weights:
    """The same by a central difference of two gradients."""
    length, size = (
        torch.stack(torch._foreach_norm(list(tensors.values()))).norm() for tensors in (direction, weights)
    )
    share = RADII.get(size.dtype, RADII[torch.float32])
    radius = share * size / length.clamp_min(torch.finfo(length.dtype).tiny)
    ahead, behind = (
        _slopes(task, {name: weight + sign * radius * direction[name] for name, weight in weights.items()})
        for sign in (1, -1)
    )
    return {name: (ahead[name] - behind[name]) / (2 * radius) for name in ahead}


HessianProduct = Callable[[Task, Weights, Weights], Weights]


def _slopes(task: Task, weights: Weights) -> Weights:
    """∇ of the loss at `weights`, with respect to them and to the task's inputs."""
    # Without autocast: the difference of two bfloat16 gradients has no correct digit.
    with full_precision(task.views[0].device.type):
        leaves = as_leaves(weights)
        return gradient_of(task.loss(task.outputs(leaves)), leaves | task.inputs)


# ∇L jumps at every kink that a difference crosses. On a ReLU ResNet-18 4e-10 crosses none, and float64 has
# the digits for it. In float32 no radius suits all: 7e-5 is right with GELU (cosine of σ's gradient with
# exact 1.00 at α = 0.03) and with ReLU 2.6 x too long (0.40). 2e-3 gives 0.99 and 0.87, and its cosine is
# below first order's at no α and K measured (bench/test_gessl.py).
RADII = {torch.float32: 2e-3, torch.float64: 4e-10}
"""Radius of the central difference in norms of the weights."""
