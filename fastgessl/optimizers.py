"""The outer optimiser by name, with the parameter groups that self-supervised recipes mean."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from fastgessl.config import OptimConfig


def scaled_learning_rate(config: OptimConfig, batch_size: int) -> float:
    """Peak learning rate for `batch_size` images an optimiser step: base_lr x batch_size / 256 (Goyal et al. 2017), or base_lr itself.

    >>> scaled_learning_rate(OptimConfig(base_lr=0.1), 512)
    0.2
    """
    return config.base_lr * batch_size / 256 if config.lr_scaling == "linear" else config.base_lr


def build_optimizer(model: nn.Module, config: OptimConfig, learning_rate: float) -> torch.optim.Optimizer:
    """SGD with momentum, LARS or AdamW over the trainable parameters; vectors (biases, normalisation) get no weight decay.

    LARS also leaves its trust ratio off vectors, as SimCLR and BYOL use it (You et al. 2017). timm's LARS would by default drop the
    ratio of every group without weight decay, matrices too, hence `always_adapt` by group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay, "always_adapt": True},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(config.momentum, 0.999))
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum)
    return Lars(groups, lr=learning_rate, momentum=config.momentum, trust_coeff=config.trust_coefficient, trust_clip=config.trust_clip)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the learning rate of the present step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
