"""A linear probe that learns alongside pretraining, behind a stop-gradient: an early look at the representation, at no cost to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate.features import Features

STATISTICS_MOMENTUM = 0.1


class OnlineProbe(nn.Module):
    """Linear classifier (N, F) -> (N, C) on detached, standardised features, with an optimiser of its own.

    `update` is called after a training step with that step's features; it reads them and touches nothing else: no weight, buffer, gradient
    or random number of the encoder's. Ranks average statistics and gradients, so that their probes stay equal. `state_dict` includes the
    optimiser.

    >>> probe = OnlineProbe(feature_dim=8, classes=3)
    >>> sorted(probe.update(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))
    ['accuracy', 'loss']
    """

    mean: Tensor
    """(F,) float32, running mean of the features."""
    variance: Tensor
    """(F,) float32, running variance."""
    updates: Tensor
    """() int64."""

    def __init__(self, feature_dim: int, classes: int, lr: float = 1e-2) -> None:
        super().__init__()
        # Zeros: the problem is convex, and drawing weights would move the random stream of the run.
        self.weight = nn.Parameter(torch.zeros(classes, feature_dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("variance", torch.zeros(feature_dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=lr)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) -> logits (N, C) float32."""
        standardised = (features.detach().float() - self.mean) / (self.variance + 1e-6).sqrt()
        return F.linear(standardised, self.weight, self.bias)

    @torch.enable_grad()
    def update(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step on features (N, F), labels (N,) in 0 … C−1 -> this rank's loss (nats) and accuracy before the step, () each."""
        features = features.float()
        with torch.autocast(features.device.type, enabled=False):
            self._follow(features)
            logits = self(features)
            loss = F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, [self.weight, self.bias])
        self.weight.grad, self.bias.grad = (_mean_over_ranks(gradient) for gradient in gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    @torch.no_grad()
    def accuracy(self, test: Features) -> float:
        """Accuracy on frozen features. Raises UsageError if they have no labels."""
        if test.labels is None:
            raise UsageError("The online probe is judged on labelled images, and these have no labels.")
        logits = self(test.features.to(self.weight.device))
        return (logits.argmax(dim=1).cpu() == test.labels).double().mean().item()

    @torch.no_grad()
    def _follow(self, features: Tensor) -> None:
        """Move the running mean and variance towards the batch's over all ranks; the first batch sets them."""
        mean = _mean_over_ranks(features.mean(dim=0))
        variance = _mean_over_ranks((features - mean).square().mean(dim=0))
        # A tensor, so that a GPU is not waited for.
        share = torch.where(self.updates == 0, 1.0, STATISTICS_MOMENTUM)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)
        self.updates += 1

    def get_extra_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _mean_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
