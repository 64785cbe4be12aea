"""Batch norm over the rows of all ranks that can be differentiated twice; torch's own `SyncBatchNorm` cannot.

Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1, with the mini-batch spread over ranks.
"""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fastgessl.config import UsageError
from fastgessl.distributed import world_group, world_size
from fastgessl.kernels.collectives import all_reduce_mean
from fastgessl.models.heads import at_least_float32


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm on (B, C, ...) with the statistics of every rank's rows in training; ranks may hold
    different numbers of rows.

    Alone (one process, evaluation, or inside `fastgessl.distributed.rank_local`) it is torch's batch norm,
    bit for bit. The running statistics are those of one process that sees all rows: mean and unbiased
    variance. The parameters and buffers carry torch's names, so checkpoints load both ways.

    >>> SynchronisedBatchNorm(3)(torch.randn(4, 3, 2, 2)).shape
    torch.Size([4, 3, 2, 2])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"synchronised batch norm was given shape {tuple(input.shape)}; it needs (batch, channels, "
                "...)."
            )

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        rows = at_least_float32(input)
        mean, variance, count = _statistics_of_all_ranks(rows)
        if self.track_running_stats:
            self._advance(mean, variance * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = (0 if self.bias is None else self.bias) - mean * scale
        channels = (1, -1) + (1,) * (input.dim() - 2)
        return (rows * scale.view(channels) + shift.view(channels)).to(input.dtype)

    @torch.no_grad()
    def _advance(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert (
            self.num_batches_tracked is not None
            and self.running_mean is not None
            and self.running_var is not None
        )
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), weight)


class SynchronisedBatchNormAct(SynchronisedBatchNorm):
    """The counterpart of timm's batch norm with a built-in drop layer and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _statistics_of_all_ranks(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and row count () over all ranks, in one collective."""
    variance, mean = torch.var_mean(rows, dim=[d for d in range(rows.dim()) if d != 1], correction=0)
    # Second moments are summed in float64: in float32, E x² - (E x)² has no digit left once the mean is 3e3
    # deviations from 0.
    mean, variance = mean.double(), variance.double()
    count = mean.new_full((1,), rows.numel() // rows.shape[1])
    sums = (
        all_reduce_mean(torch.cat([count * mean, count * (variance + mean.square()), count]), world_group())
        * world_size()
    )
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean.to(rows.dtype), (square - mean.square()).clamp_min(0).to(rows.dtype), sums[-1].detach()


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """The same network with every batch norm synchronised; parameters, buffers and their names are kept
    (shared, not copied).

    Raises UsageError for a kind of batch norm that it does not know, rather than leave one rank-local.

    >>> net = synchronise_batch_norm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    >>> type(net[1]).__name__
    'SynchronisedBatchNorm'
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SynchronisedBatchNorm):
        return _synchronised(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise_batch_norm(child))
    return module


def _synchronised(norm: nn.modules.batchnorm._BatchNorm) -> SynchronisedBatchNorm:
    kind = SynchronisedBatchNormAct if isinstance(norm, BatchNormAct2d) else SynchronisedBatchNorm
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
    if type(norm) not in plain:
        raise UsageError(
            f"no synchronised counterpart of {type(norm).__module__}.{type(norm).__name__} is known. "
            "Use --model.batch_norm local, or a backbone with plain batch norm."
        )
    new = kind(
        norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=norm.track_running_stats
    )
    new.affine, new.weight, new.bias = norm.affine, norm.weight, norm.bias
    new.running_mean, new.running_var, new.num_batches_tracked = (
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
    )
    if isinstance(norm, BatchNormAct2d):
        new.drop, new.act = norm.drop, norm.act
    return new.train(norm.training)
