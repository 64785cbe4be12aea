"""LARS against its formula; decay and trust ratio stay off vectors."""

import pytest
import torch
from torch import nn

from fastgessl.config import OptimConfig
from fastgessl.training.optimizers import build_optimizer, clip_each


def _model() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    model.weight.grad = torch.randn_like(model.weight)
    model.bias.grad = torch.randn_like(model.bias)
    return model


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("trust_clip", [False, True])
def test_lars_step_equals_its_formula(weight_decay, trust_clip):
    model, rate, eta = _model(), 0.5, 0.02
    weight, gradient = model.weight.detach().clone(), model.weight.grad.clone()
    bias, bias_gradient = model.bias.detach().clone(), model.bias.grad.clone()
    config = OptimConfig(
        name="lars", momentum=0.9, weight_decay=weight_decay, trust_coefficient=eta, trust_clip=trust_clip
    )
    build_optimizer(model, config, rate).step()
    ratio = eta * weight.norm() / (gradient.norm() + weight_decay * weight.norm())
    if trust_clip:
        ratio = min(ratio / rate, 1.0)
    torch.testing.assert_close(
        model.weight.detach(), weight - rate * ratio * (gradient + weight_decay * weight), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(model.bias.detach(), bias - rate * bias_gradient)


@pytest.mark.parametrize("trust_clip", [False, True])
def test_lars_over_several_steps_keeps_a_momentum_of_scaled_gradients_outside_of_the_learning_rate(
    trust_clip,
):
    """You et al. 2017, algorithm 1, and LARC's clip; a matrix at 0 and a vector take the plain gradient."""
    torch.manual_seed(0)
    matrix, zero, vector = (nn.Parameter(torch.randn(shape).double()) for shape in ((4, 3), (2, 2), (3,)))
    torch.nn.init.zeros_(zero)
    eta, decay, momentum = 0.02, 0.1, 0.9
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
            if rate == 0.0:
                break
    for parameter, weight in zip((matrix, zero, vector), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-6, atol=1e-9)


def _stepped(config: OptimConfig, gradients: list[torch.Tensor], rate: float) -> torch.Tensor:
    """A vector that starts at 0 and has no weight decay, after a step a gradient."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = build_optimizer(nn.ParameterList([parameter]), config, rate)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_sgd_keeps_its_momentum_outside_of_the_learning_rate():
    first, second = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    found = _stepped(OptimConfig(name="sgd", momentum=0.8), [first, second], 0.1)
    torch.testing.assert_close(found, -0.1 * (first + (0.8 * first + second)))


def test_adamw_takes_momentum_as_its_first_beta():
    """Kingma and Ba 2015, algorithm 1, at the second step."""
    first, second = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    found = _stepped(OptimConfig(name="adamw", momentum=0.8), [first, second], 0.1)
    mean = (0.8 * 0.2 * first + 0.2 * second) / (1 - 0.8**2)
    square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    torch.testing.assert_close(
        found, -0.1 * first / (first.abs() + 1e-8) - 0.1 * mean / (square.sqrt() + 1e-8)
    )


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
