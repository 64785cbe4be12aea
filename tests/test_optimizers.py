"""LARS against its formula; decay and trust ratio stay off vectors."""

import pytest
import torch
from torch import nn

from fastgessl.config import OptimConfig
from fastgessl.optimizers import build_optimizer, scaled_learning_rate, set_learning_rate


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
    config = OptimConfig(name="lars", momentum=0.9, weight_decay=weight_decay, trust_coefficient=eta, trust_clip=trust_clip)
    build_optimizer(model, config, rate).step()
    ratio = eta * weight.norm() / (gradient.norm() + weight_decay * weight.norm())
    if trust_clip:
        ratio = min(ratio / rate, 1.0)
    torch.testing.assert_close(model.weight.detach(), weight - rate * ratio * (gradient + weight_decay * weight), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.bias.detach(), bias - rate * bias_gradient)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_weight_decay_never_touches_vectors(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1), 0.1)
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == {id(model[0].weight)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in build_optimizer(model, OptimConfig(), 0.1).param_groups) == 1


def test_learning_rate_scales_with_the_batch_unless_told_not_to():
    assert scaled_learning_rate(OptimConfig(base_lr=0.3), 4096) == pytest.approx(4.8)
    assert scaled_learning_rate(OptimConfig(base_lr=0.3, lr_scaling="none"), 4096) == 0.3


def test_learning_rate_reaches_every_group():
    optimizer = build_optimizer(_model(), OptimConfig(), 0.1)
    set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
