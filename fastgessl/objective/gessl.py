"""GeSSL: descend the SSL loss and, in expectation over tasks, the distance to the model that a few more steps
would make.

"Explicitly Modeling Universality into Self-Supervised Learning", arXiv 2405.01053, versions 1-4
(σ-measurement and self-motivated target). How many steps, how large, and how the outer gradient passes
through them are options of ours: see docs/gessl.md.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgessl.config import GesslConfig, UsageError
from fastgessl.distributed import world_size
from fastgessl.methods.base import Method, Outputs
from fastgessl.models import SynchronisedBatchNorm
from fastgessl.objective.bilevel import LookAhead, bi_level_sigma
from fastgessl.objective.differentiable import (
    buffers_retained,
    check_modules,
    check_sharding,
    math_attention,
    second_order,
)
from fastgessl.objective.inner import Sgd, attach_gradients
from fastgessl.objective.task import Noise, Task, adapted_weights, rank_local_task


@dataclass(frozen=True)
class Result:
    """One micro-batch: the loss to backpropagate, what to log, and what `Method.update_state` needs."""

    loss: Tensor
    """(), with gradient."""
    metrics: dict[str, Tensor]
    """loss_ssl and, unless left out, the method's own measures; on σ steps also sigma (nats), delta_loss =
    L(θ_t) - L(θ), and inner_lr where it is scheduled. Each (), detached, of this rank."""
    outputs: Outputs
    """Of the one forward at the present weights, detached."""
    targets: Any
    """What `Method.targets` and `Method.settle` gave."""


class GeSSL(nn.Module):
    """A method's objective: views in, loss out. Wrap this module in DDP (`broadcast_buffers=False`), not the
    method.

    `w_sigma = 0` is plain self-supervised learning in the same code path. Raises UsageError where the
    settings ask for a second derivative that the method does not have.

    >>> from fastgessl.config import MethodConfig, ModelConfig
    >>> from fastgessl.methods import RunFacts, build_method
    >>> from fastgessl.models import build_backbone
    >>> backbone = build_backbone(ModelConfig(stem="small", width=0.125))
    >>> method = build_method(MethodConfig(projector_hidden=16), backbone, RunFacts())
    >>> import torch
    >>> objective = GeSSL(method, GesslConfig(w_sigma=1.0))
    >>> result = objective([torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)], step=0)
    >>> result.loss.backward()
    >>> sorted(result.metrics)
    ['delta_loss', 'loss_ssl', 'sigma']
    """

    def __init__(self, method: Method, settings: GesslConfig):
        super().__init__()
        if settings.w_sigma > 0:
            check_modules(method, settings)
            if not adapted_weights(method, settings.scope):
                raise UsageError(
                    f"gessl.scope '{settings.scope}' leaves the inner steps nothing to adapt: "
                    f"{type(method).__name__} has no trainable parameter there. Use scope 'all', or give the "
                    "method a head."
                )
        self.method = method
        self.settings = settings

    def forward(
        self,
        views: Sequence[Tensor],
        step: int = 0,
        query_views: Sequence[Tensor] | None = None,
        inner_lr: float | None = None,
        labels: Tensor | None = None,
        *,
        measured: bool = True,
    ) -> Result:
        """V views of N samples, whatever the method takes (images: each (N, 3, S, S)) -> Result. `step` is
        the optimiser step.

        `query_views`, further views of the same samples, are needed for `query: fresh_views` on the steps
        that compute σ; `inner_lr`, this step's α (`schedules.inner_learning_rate`), where `inner_lr_schedule`
        is not constant; `labels` (N,) int64 by a method that learns from them. `measured`: whether the
        method's own measures are wanted, as they are on steps that are logged. UsageError if views or labels
        are missing, or if there are more or fewer views than the method takes.
        """
        self.method.check_views(views, labels)
        settings = self.settings
        with_sigma = settings.w_sigma > 0 and step % settings.every == 0
        twice = with_sigma and second_order(settings)
        if with_sigma:
            # Here and not at the start: modules are sharded after they are built.
            check_sharding(self.method)
        with buffers_retained() if settings.w_sigma > 0 else nullcontext():
            with math_attention() if twice and settings.scope == "all" else nullcontext():
                aux = self.method.targets(views, labels)
                noise = Noise.now(views[0].device) if with_sigma else None
                out = self.method(views)
            detached = out.detached()
            with torch.autocast(views[0].device.type, enabled=False):  # as in `full_precision`
                with torch.no_grad():
                    settled = self.method.settle(detached, aux)
                loss_ssl = self.method.loss(out, settled)
                loss, metrics = settings.w_ssl * loss_ssl, {"loss_ssl": loss_ssl.detach()}
                if measured:
                    with torch.no_grad():
                        metrics |= self.method.measures(detached, settled)
            if noise is not None:
                with math_attention() if twice else nullcontext():
                    task = self._task(views, labels, aux if self._compares_ranks() else settled, noise, out)
                    query = task if settings.query == "same" else self._fresh_task(query_views, labels)
                    loss, of_sigma = self._bi_level(self._sgd(inner_lr), loss_ssl, out, task, query)
                    metrics |= of_sigma
        return Result(loss, metrics, detached, settled)

    def _bi_level(
        self, sgd: Sgd, loss_ssl: Tensor, out: Outputs, task: Task, query: Task
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """w_ssl L + w_sigma σ, and σ's metrics. Where inner and outer loss are one, so are their gradients,
        and L is not run back again.
        """
        settings = self.settings
        one_forward = settings.scope == "all" and not self._mixes_ranks()
        one_loss = one_forward and not self._compares_ranks()
        weights = adapted_weights(self.method, settings.scope)
        first = out if one_forward else task.outputs(weights)
        settled = task.settled(first)
        task, query = settled, settled if query is task else query
        inner_loss = loss_ssl if one_loss else task.loss(first)
        ahead = LookAhead(settings, sgd, task, query)
        needed = one_forward and not one_loss
        measured = bi_level_sigma(ahead, weights, first, inner_loss, loss_needs_graph=needed)
        if one_loss:
            loss_ssl = attach_gradients(loss_ssl, list(weights.values()), list(measured.gradient.values()))
        gated = measured.sigma * (measured.delta_loss <= 0) if settings.gate else measured.sigma
        metrics = {"sigma": measured.sigma.detach(), "delta_loss": measured.delta_loss}
        if settings.inner_lr_schedule != "constant":
            metrics["inner_lr"] = loss_ssl.detach().new_full((), sgd.lr)
        return settings.w_ssl * loss_ssl + settings.w_sigma * gated, metrics

    def _task(
        self, views: Sequence[Tensor], labels: Tensor | None, aux: Any, noise: Noise, out: Outputs
    ) -> Task:
        """This rank's task. It shares the outer forward's targets and features unless batch norm mixed other
        ranks' rows into them.
        """
        if self._mixes_ranks():
            return rank_local_task(self.method, views, labels, self.settings.scope)
        return Task(self.method, views, aux, noise, out.features if self.settings.scope == "head" else None)

    def _sgd(self, inner_lr: float | None) -> Sgd:
        settings = self.settings
        if inner_lr is None and settings.inner_lr_schedule != "constant":
            raise UsageError(
                f"gessl.inner_lr_schedule is '{settings.inner_lr_schedule}' and no inner_lr was given. Pass "
                "this step's entry of "
                "fastgessl.schedules.inner_learning_rate, or use 'constant'."
            )
        return Sgd(settings.inner_lr if inner_lr is None else inner_lr, settings.inner_momentum)

    def _fresh_task(self, query_views: Sequence[Tensor] | None, labels: Tensor | None) -> Task:
        if query_views is None:
            raise UsageError(
                "gessl.query is 'fresh_views' and no query_views were given. Pass a further pair of views, "
                "or use 'same'."
            )
        self.method.check_views(query_views, labels)
        return rank_local_task(self.method, query_views, labels, self.settings.scope)

    def _mixes_ranks(self) -> bool:
        return world_size() > 1 and any(
            isinstance(module, SynchronisedBatchNorm) for module in self.method.modules()
        )

    def _compares_ranks(self) -> bool:
        return world_size() > 1 and self.method.gathers
