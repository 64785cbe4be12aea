"""Builds the outer optimizer by name, with the parameter groups that self-supervised recipes mean."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from fastgessl.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, learning_rate: float) -> torch.optim.Optimizer:
    """SGD with momentum, LARS or AdamW over the trainable parameters; vectors (biases, normalization) get no
    weight decay.

    LARS also leaves its trust ratio off vectors, as SimCLR and BYOL use it (You et al. 2017). timm's LARS
    would by default drop the ratio of every group without weight decay, matrices too, hence `always_adapt`
    per group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in trainable if parameter.ndim > 1],
            "weight_decay": config.weight_decay,
            "always_adapt": True,
        },
        {
            "params": [parameter for parameter in trainable if parameter.ndim <= 1],
            "weight_decay": 0.0,
            "always_adapt": False,
        },
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(config.momentum, 0.999))
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum)
    return Lars(
        groups,
        lr=learning_rate,
        momentum=config.momentum,
        trust_coeff=config.trust_coefficient,
        trust_clip=config.trust_clip,
    )


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], longest: float) -> None:
    """Shorten every parameter's gradient that is longer than `longest` to that norm, each for itself, as DINO
    does (Caron et al. 2021, its code); the usual clipping shortens all of them together.

    >>> weight, bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    >>> weight.grad, bias.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    >>> clip_each([weight, bias], 1.0)
    >>> weight.grad, bias.grad
    (tensor([0.6000, 0.8000]), tensor([0.3000, 0.4000]))
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient, norm in zip(gradients, torch._foreach_norm(gradients) if gradients else (), strict=True):
        gradient.mul_((longest / norm).clamp_max(1))
