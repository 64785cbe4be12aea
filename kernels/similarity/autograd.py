"""Autograd of the softmax over similarities: nested functions that survive func.grad of func.grad, vmap, jvp
and forward over reverse.

`Statistics` is differentiated by `Gradients`, that by `Curvature`, and a third derivative raises. Inputs and
outputs are those of the operators of the same names in `similarity.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.distributed import ProcessGroup

from fastgessl.kernels.checks import Given, check_batch, signed_once
from fastgessl.kernels.similarity.chunked import Side
from fastgessl.kernels.similarity.operators import (
    OPERANDS,
    THIRD_ORDER,
    WEIGHTS,
    curvature,
    curvature_body,
    gradients,
    gradients_backward,
    gradients_body,
    gradients_context,
    statistics,
    statistics_backward,
    statistics_body,
    statistics_context,
)


def plain(inputs: Sequence[Any]) -> bool:
    """Whether these are ordinary tensors. Then the operator's body may be called as it is, which saves 80 us
    of dispatch a call.
    """
    return all(type(part) in (Tensor, torch.nn.Parameter) for part in inputs if isinstance(part, Tensor))


def compiled(*operands: Tensor | None) -> bool:
    """Whether torch.compile is tracing, where the operators themselves are to be called. Raises RuntimeError
    if it traces forward mode.

    Registered autograd would drop the tangents and return 0 without an error (torch 2.15). Dynamo answers the
    error by running the code eagerly, unless fullgraph=True.
    """
    if not torch.compiler.is_compiling():
        return False
    if any(operand is not None and unpack_dual(operand).tangent is not None for operand in operands):
        raise RuntimeError(
            "fastgessl.kernels: forward mode cannot be compiled with fullgraph=True. Call jvp outside "
            "torch.compile."
        )
    return True


def one_call_each(
    function: type[torch.autograd.Function], size: int, dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """vmap by one call an example: the kernels fill a device with one problem already."""
    check_batch(size)
    calls = [
        function.apply(
            *(
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, dims, strict=True)
            )
        )
        for i in range(size)
    ]
    stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
    return stacked, (0,) * len(stacked)


@signed_once
class Curvature(torch.autograd.Function):
    """Double backward. A function, not the bare operator, so that functorch levels unwrap; its own derivative
    raises.
    """

    @staticmethod
    def forward(*inputs):
        return (curvature_body if plain(inputs) else curvature)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(THIRD_ORDER)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(THIRD_ORDER)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_call_each(Curvature, info.batch_size, in_dims, args)


@signed_once
class Gradients(torch.autograd.Function):
    """Backward, itself differentiable once."""

    @staticmethod
    def forward(*inputs):
        return (gradients_body if plain(inputs) else gradients)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gradients_context(ctx, inputs, output)
        ctx.save_for_forward(*(part for part in inputs if part is None or isinstance(part, Tensor)))

    @staticmethod
    def backward(ctx, *tangents):
        return gradients_backward(ctx, tangents, Curvature.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        # The Hessian is symmetric: forward over reverse is the double-backward kernel, plus the gradients
        # along the weights' tangents.
        inputs, (entropy, implementation, needs) = ctx.saved_tensors, ctx.settings
        weights = [
            None if weight is None else _filled(tangent, weight)
            for tangent, weight in zip(tangents, inputs[:WEIGHTS], strict=False)
        ]
        bent = Curvature.apply(
            *tangents[WEIGHTS : WEIGHTS + OPERANDS], *inputs, entropy, implementation, needs
        )[WEIGHTS:]
        if all(tangent is None for tangent in tangents[:WEIGHTS]):
            return bent
        straight = Gradients.apply(*weights, *inputs[WEIGHTS:], entropy, implementation, needs)
        return tuple(a + b for a, b in zip(bent, straight, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_call_each(Gradients, info.batch_size, in_dims, args)


def _filled(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


@signed_once
class RowDerivatives(torch.autograd.Function):
    """Forward mode: the statistics' derivatives along tangents of the operands. Reverse over it is the
    double-backward kernel once more.
    """

    @staticmethod
    def forward(*inputs):
        operands, (positives, _, saved) = (
            inputs[OPERANDS : 2 * OPERANDS],
            inputs[2 * OPERANDS : 2 * OPERANDS + 3],
        )
        none = torch.zeros_like(saved[0])
        weights = (none, None if positives is None else none, None if operands[4] is None else none)
        call: Callable[..., tuple[Tensor, ...]] = curvature_body if plain(inputs) else curvature
        return call(*inputs[:OPERANDS], *weights, *inputs[OPERANDS:], (False,) * OPERANDS)[:WEIGHTS]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[-2:]
        ctx.save_for_backward(*inputs[:-2])

    @staticmethod
    def backward(ctx, *weights):
        tangents, inputs = ctx.saved_tensors[:OPERANDS], ctx.saved_tensors[OPERANDS:]
        operands, (positives, _, saved) = inputs[:OPERANDS], inputs[OPERANDS:]
        present = (True, positives is not None, operands[4] is not None)
        weights = tuple(
            _filled(weight, saved[0]) if here else None for weight, here in zip(weights, present, strict=True)
        )
        needs = ctx.needs_input_grad
        straight = Gradients.apply(*weights, *inputs, *ctx.settings, needs[:OPERANDS])
        bent = Curvature.apply(*tangents, *weights, *inputs, *ctx.settings, needs[OPERANDS : 2 * OPERANDS])[
            WEIGHTS:
        ]
        found = (grad if need else None for grad, need in zip((*straight, *bent), needs, strict=False))
        return (*found, *(None,) * (len(needs) - 2 * OPERANDS))

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(FORWARD_OVER_FORWARD)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_call_each(RowDerivatives, info.batch_size, in_dims, args)


FORWARD_OVER_FORWARD = (
    "fastgessl.kernels: forward mode over forward mode is not implemented for the similarity losses. "
    "Take one of the two derivatives in reverse (jacfwd of jacrev, jvp of grad, grad of jvp)."
)


@signed_once
class Statistics(torch.autograd.Function):
    """Forward. The last output is for the later passes and carries no gradient."""

    @staticmethod
    def forward(*inputs):
        return (statistics_body if plain(inputs) else statistics)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        statistics_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_forward(
            *(part for part in inputs[:-1] if part is None or isinstance(part, Tensor)), output[3]
        )

    @staticmethod
    def backward(ctx, *cotangents):
        return statistics_backward(ctx, cotangents, Gradients.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        rows = RowDerivatives.apply(*tangents[:OPERANDS], *ctx.saved_tensors, *ctx.settings)
        return (*rows, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_call_each(Statistics, info.batch_size, in_dims, args)


def similarity_statistics(
    student: Side,
    teacher: Side | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    entropy: bool,
    implementation: str,
    given: Given,
    ring: ProcessGroup | None = None,
    tied: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, positive and divergence, (M,) each, twice differentiable in all operands; see `similarity.chunked`
    for their definitions.

    `positive` is empty without positives, `divergence` without a teacher. With `ring`, keys and biases are
    this rank's shard of all, and column numbers are global. `given`: whose values are checked. `tied`: the
    student's key is its query, which saves two of the backward's four matmul units on a GPU.
    """
    key = None if tied and ring is None else student.key
    operands = (student.query, key, student.scale, student.bias, *(teacher or (None,) * 4))
    if ring is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "fastgessl.kernels: the ring cannot be compiled with fullgraph=True. Call the loss outside "
                "torch.compile."
            )
        from fastgessl.kernels.similarity.ring import RingStatistics

        return RingStatistics.apply(*operands, positives, exclude, entropy, implementation, ring, given)[:3]
    call = statistics if compiled(*operands) else Statistics.apply
    return call(*operands, positives, exclude, entropy, implementation, given)[:3]
