"""A linear probe that learns alongside pretraining, behind a stop-gradient: an early look at the
representation, at no cost to it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastgessl.evaluate.features import Features

STATISTICS_MOMENTUM = 0.1


class OnlineProbe(nn.Module):
    """Linear classifier (N, F) -> (N, C) on detached, standardised features, with an optimiser of its own.

    `update` is called after a training step with that step's features; it reads them and touches nothing
    else: no weight, buffer, gradient or random number of the encoder's. Ranks share statistics and gradients,
    so that their probes stay equal. `state_dict` includes the optimiser.

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
    def update(self, features: Tensor, labels: Tensor, chosen: Tensor | None = None) -> dict[str, Tensor]:
        """One step on features (N, F), labels (N,) in 0 … C−1 -> this rank's loss (nats) and accuracy before
        the step, () each.

        `chosen` (N,) bool: the rows to learn from, None for all. A mask, because a rank that has none of them
        must still meet the others.
        """
        features = features.float()
        rows = torch.ones_like(features[:, 0]) if chosen is None else chosen.float()
        count, mine = _sum_over_ranks(rows.sum()), rows.sum().clamp(min=1)
        with torch.autocast(features.device.type, enabled=False):
            self._follow(features, rows, count)
            logits = self(features)
            losses = rows * F.cross_entropy(logits, labels, reduction="none")
            gradients = torch.autograd.grad(losses.sum() / count.clamp(min=1), [self.weight, self.bias])
        self.weight.grad, self.bias.grad = (_sum_over_ranks(gradient) for gradient in gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        right = (rows * (logits.argmax(dim=1) == labels)).sum()
        return {"loss": losses.detach().sum() / mine, "accuracy": right / mine}

    @torch.no_grad()
    def accuracy(self, test: Features) -> float:
        """Accuracy on frozen features with labels."""
        return test.accuracy_of(self(test.features.to(self.weight.device)).argmax(dim=1).cpu())

    @torch.no_grad()
    def _follow(self, features: Tensor, rows: Tensor, count: Tensor) -> None:
        """Move the running mean and variance towards those of the batch's `rows`, (N,) of 0 and 1, `count` of
        them over all ranks; the first batch sets them."""
        mean = _sum_over_ranks(rows @ features) / count.clamp(min=1)
        variance = _sum_over_ranks(rows @ (features - mean).square()) / count.clamp(min=1)
        # A tensor, so that a GPU is not waited for.
        share = torch.where(self.updates == 0, 1.0, STATISTICS_MOMENTUM) * (count > 0)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)
        self.updates += count > 0

    def get_extra_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _sum_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
