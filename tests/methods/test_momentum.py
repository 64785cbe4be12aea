"""What the methods with a momentum encoder share."""

import math

import pytest
import torch
from torch import nn
from toys import method_config, toy_backbone, toy_images, toy_method, trained

from fastgessl.config import ModelConfig
from fastgessl.methods import RunFacts, build_method
from fastgessl.models import build_backbone

OPTIONS = {"moco": {"queue_length": 10}, "dino": {"prototypes": 9}}


def toy(name, total_steps=10, **options):
    facts = RunFacts(total_steps=total_steps, images_per_forward=5)
    return toy_method(name, facts, toy_backbone(norm=True), **options | OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", ["byol", "moco", "mocov3", "dino"])
def test_the_momentum_encoder_follows_a_literal_simulation(name):
    """Grill et al. 2020, section 3.2: ξ ← τ ξ + (1 - τ) θ with τ_k = τ_K - (τ_K - τ_0)(cos(πk/K) + 1)/2,
    parameter by parameter.
    """
    method = toy(name, momentum_start=0.9, momentum_end=0.999)
    online = dict(method.named_parameters())
    followed = {key for key in online if key.startswith("momentum_")}
    average = {key: online[key.removeprefix("momentum_")].detach().clone() for key in followed}
    for step in range(10):
        trained(method, 1, first=step)
        tau = 0.999 - (0.999 - 0.9) * (math.cos(math.pi * step / 10) + 1) / 2
        average = {
            key: tau * xi + (1 - tau) * online[key.removeprefix("momentum_")].detach()
            for key, xi in average.items()
        }
    found = {key: online[key].detach() for key in followed}
    torch.testing.assert_close(found, average, rtol=1e-10, atol=1e-12)
    assert (found["momentum_backbone.1.weight"] - online["backbone.1.weight"]).abs().max() > 1e-3


def test_the_momentum_encoder_has_its_own_batch_statistics_and_no_gradient():
    method = toy("byol")
    online_before = method.backbone[2].running_mean.clone()
    momentum_before = method.momentum_backbone[2].running_mean.clone()
    targets = method.targets(toy_images())
    assert not targets.requires_grad and not any(
        p.requires_grad for p in method.momentum_backbone.parameters()
    )
    assert torch.equal(method.backbone[2].running_mean, online_before)
    rows = method.momentum_backbone[1](torch.cat(toy_images()).flatten(1)).detach()
    torch.testing.assert_close(
        method.momentum_backbone[2].running_mean, 0.9 * momentum_before + 0.1 * rows.mean(0)
    )


def test_the_momentum_encoder_leaves_out_no_branch():
    backbone = build_backbone(ModelConfig(stem="small", width=0.125, drop_path=0.5))
    for part in backbone.modules():
        # timm starts the last norm of a branch from 0, and whether such a branch is left out does not show.
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    method = build_method(method_config("byol"), backbone, RunFacts(total_steps=10))
    images = torch.randn(8, 3, 8, 8)
    assert method.training and method.momentum_backbone.training
    assert torch.equal(method.targets([images, images]), method.targets([images, images]))
    assert not torch.equal(method.backbone(images), method.backbone(images))


def test_a_step_past_the_end_of_the_run_is_an_error():
    with pytest.raises(IndexError):
        toy("byol", total_steps=3).update_state([], 3)


def test_the_momentum_schedule_is_not_part_of_the_state():
    assert set(toy("byol", total_steps=3).state_dict()) == set(toy("byol", total_steps=5).state_dict())
