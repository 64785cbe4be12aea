"""LARS against its formula; decay and trust ratio stay off vectors."""

import pytest
import torch
from torch import nn

from fastgessl.config import OptimConfig
from fastgessl.training.optimizers import build_optimizer, clip_each


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("trust_clip", [False, True])
def test_lars_over_several_steps_keeps_a_momentum_of_scaled_gradients_outside_of_the_learning_rate(
    trust_clip, decay
):
    """You et al. 2017, algorithm 1, and LARC's clip; a matrix at 0 and a vector take the plain gradient."""
    torch.manual_seed(0)
    matrix, zero, vector = (nn.Parameter(torch.randn(shape).double()) for shape in ((4, 3), (2, 2), (3,)))
    torch.nn.init.zeros_(zero)
    eta, momentum = 0.02, 0.9
    config = OptimConfig(
        name="lars", momentum=momentum, weight_decay=decay, trust_coefficient=eta, trust_clip=trust_clip
    )
    optimizer = build_optimizer(nn.ParameterList([matrix, zero, vector]), config, 1.0)
    weights = [parameter.detach().clone() for parameter in (matrix, zero, vector)]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for rate in (0.5, 0.2, 0.05, 0.0):
        for group in optimizer.param_groups:
            group["lr"] = rate
        gradients = [torch.randn_like(weight) for weight in weights]
        for parameter, gradient in zip((matrix, zero, vector), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            update = gradient
            if weight.ndim > 1:
                trust = (
                    eta * weight.norm() / (gradient.norm() + decay * weight.norm())
                    if weight.norm() > 0
                    else 1.0
                )
                trust = min(trust / rate, 1.0) if trust_clip and rate > 0 else trust
                update = trust * (gradient + decay * weight)
            velocities[index] = momentum * velocities[index] + update
            weights[index] = weight - rate * velocities[index]
    for parameter, weight in zip((matrix, zero, vector), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "dampening": 0}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.999), "eps": 1e-8}),
    ],
)
def test_torch_s_optimizers_get_the_momentum(name, kind, options):
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(name=name, momentum=0.8), 0.1)
    assert type(optimizer) is kind and options.items() <= optimizer.defaults.items()
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)


def test_each_gradient_is_shortened_to_the_longest_norm_by_itself():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    expected = []
    for parameter, length in zip(model.parameters(), (0.0, 1.0, 3.0, 40.0), strict=True):
        parameter.grad = (
            nn.functional.normalize(torch.randn_like(parameter).flatten(), dim=0).view_as(parameter) * length
        )
        expected.append(parameter.grad * min(3.0 / length, 1.0) if length else parameter.grad.clone())
    clip_each(model.parameters(), 3.0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=0)
    model.zero_grad()
    clip_each(model.parameters(), 3.0)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_weight_decay_never_touches_vectors(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1), 0.1)
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert decayed == {id(model[0].weight)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in build_optimizer(model, OptimConfig(), 0.1).param_groups) == 1
