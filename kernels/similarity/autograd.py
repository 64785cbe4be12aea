"""The softmax over similarities as one differentiable function: its operators, and nested functions over them that
survive func.grad of func.grad and vmap.

`statistics` (forward), `gradients` (backward) and `curvature` (double backward) are operators, opaque to torch.compile,
with fakes and a registered autograd. They take the eight operands in this order: the student's query, key, scale, bias,
then the teacher's. A bias, or the whole teacher, may be None; a key that is None means the queries themselves. An output
that is absent or not needed is an empty tensor.

Registered autograd serves torch.compile only: under func.grad it fails, and under func.jvp it returns 0 without an error
(torch 2.15). Eager code goes through `Statistics`, which `Gradients` differentiates, and that `Curvature`; a third
derivative and forward mode raise.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import custom_op

from fastgessl.kernels.similarity import chunked
from fastgessl.kernels.similarity.problem import RowStatistics, RowWeights, Side, SideValues

OPERANDS = 8
WEIGHTS = 3
THIRD_ORDER = (
    "fastgessl.kernels: third derivatives of the similarity losses are not implemented. "
    'Pass implementation="reference" for derivatives of any order on a dense table.'
)
FORWARD_MODE = (
    "fastgessl.kernels: forward mode (jvp, jacfwd, forward_ad) is not implemented for the similarity losses. "
    "Take derivatives in reverse: torch.func.jacrev, or grad of grad for the second order. "
    'Only implementation="reference" has forward mode.'
)


def sides_of(operands: Sequence[Any]) -> tuple[Side, Side | None]:
    query, key = operands[:2]
    return Side(query, query if key is None else key, *operands[2:4]), None if operands[4] is None else Side(
        *operands[4:]
    )


def packed(found: RowStatistics) -> Tensor:
    """What the later passes read of the forward's results, (2, M), or (5, M) with a teacher."""
    return torch.stack([found.lse, *(part for part in found[3:] if len(part))])


def unpacked(saved: Tensor) -> RowStatistics:
    """The inverse of `packed`."""
    lse, correction, *teacher = saved.unbind()
    none = lse.new_empty(0)
    return RowStatistics(lse, none, none, correction, *(teacher or (none, none, none)))


def implementation_module(name: str) -> Any:
    """The module that holds statistics, gradients and curvature under this name. Triton is imported on its
    first use only.
    """
    return chunked if name == "chunked" else importlib.import_module("fastgessl.kernels.similarity.launch")


def present(parts: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator cannot return None: an empty tensor stands for what is absent."""
    return tuple(like.new_empty(0) if part is None else part for part in parts)


def contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Cotangents have any strides (cat gives narrow views, sum stride 0); neither gradcheck nor opcheck notices a kernel
    that minds.
    """
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def statistics_body(
    query: Tensor, key: Tensor | None, scale: Tensor, bias: Tensor | None,
    teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_scale: Tensor | None, teacher_bias: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, entropy: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """lse, positive and cross term, (M,) each, empty where there are no positives or no teacher; and what the later
    passes read."""
    operands = contiguous((query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias))
    with torch.autocast(query.device.type, enabled=False):
        found = implementation_module(implementation).statistics(
            *sides_of(operands), positives, exclude, entropy
        )
    return *found[:3], packed(found)


def _fake_statistics(
    query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias, positives, exclude, *_
):
    M, dtype = query.shape[0], chunked.accumulation_dtype(query.dtype)
    of_positives, of_teacher = (0 if part is None else M for part in (positives, teacher_query))
    shapes = ((M,), (of_positives,), (of_teacher,), (2 if teacher_query is None else 5, M))
    return tuple(query.new_empty(shape, dtype=dtype) for shape in shapes)


def gradients_body(
    weight_lse: Tensor, weight_positive: Tensor | None, weight_cross_term: Tensor | None,
    query: Tensor, key: Tensor | None, scale: Tensor, bias: Tensor | None,
    teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_scale: Tensor | None, teacher_bias: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, saved: Tensor,
    entropy: bool, implementation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Σ weights·statistics to the eight operands; empty where `needs` says no."""
    weights = RowWeights(*present(contiguous((weight_lse, weight_positive, weight_cross_term)), saved))
    operands = contiguous((query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias))
    with torch.autocast(query.device.type, enabled=False):
        student, teacher = implementation_module(implementation).gradients(
            weights, *sides_of(operands), positives, exclude, unpacked(saved), entropy,
            tuple(needs[:4]), tuple(needs[4:]), tied=key is None,
        )  # fmt: skip
    return present((*student, *teacher), query)  # type: ignore[return-value]


def empty_where_needed(operands: Sequence[Any], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a fake gives for gradients: the operand's shape, or an empty tensor."""
    parts = (torch.empty_like(part) if need else None for part, need in zip(operands, needs, strict=True))
    return present(tuple(parts), operands[0])


def _fake_gradients(*inputs):
    return empty_where_needed(inputs[WEIGHTS : WEIGHTS + OPERANDS], inputs[-1])


def curvature_body(
    tangent_query: Tensor | None, tangent_key: Tensor | None, tangent_scale: Tensor | None, tangent_bias: Tensor | None,
    tangent_teacher_query: Tensor | None, tangent_teacher_key: Tensor | None,
    tangent_teacher_scale: Tensor | None, tangent_teacher_bias: Tensor | None,
    weight_lse: Tensor, weight_positive: Tensor | None, weight_cross_term: Tensor | None,
    query: Tensor, key: Tensor | None, scale: Tensor, bias: Tensor | None,
    teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_scale: Tensor | None, teacher_bias: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, saved: Tensor,
    entropy: bool, implementation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ⟨tangents, gradients(...)⟩ to the three weights and the eight operands; empty where absent
    or where `needs` says no."""
    tangents = contiguous((tangent_query, tangent_key, tangent_scale, tangent_bias))
    teacher_tangents = contiguous(
        (tangent_teacher_query, tangent_teacher_key, tangent_teacher_scale, tangent_teacher_bias)
    )
    weights = RowWeights(*present(contiguous((weight_lse, weight_positive, weight_cross_term)), saved))
    operands = contiguous((query, key, scale, bias, teacher_query, teacher_key, teacher_scale, teacher_bias))
    statistics = unpacked(saved)
    with torch.autocast(query.device.type, enabled=False):
        if implementation == "triton" and any(part is not None for part in teacher_tangents):
            # Chunked takes over, with statistics of its own: on those of the kernels, whose logits are
            # rounded otherwise, σ's second derivatives at τ = 0.01 were wrong by 2.5e-4 (float32), 2.5e-6
            # with its own.
            implementation, statistics = (
                "chunked",
                chunked.statistics(*sides_of(operands), positives, exclude, entropy),
            )
        moments, student, teacher = implementation_module(implementation).curvature(
            SideValues(*tangents), SideValues(*teacher_tangents), weights, *sides_of(operands),
            positives, exclude, statistics, entropy, tuple(needs[:4]), tuple(needs[4:]), tied=key is None,
        )  # fmt: skip
    rows = chunked.row_derivatives(moments)
    return (*rows, *present((*student, *teacher), query))  # type: ignore[return-value]


def _fake_curvature(*inputs):
    weights, saved = inputs[OPERANDS : OPERANDS + WEIGHTS], inputs[2 * OPERANDS + WEIGHTS + 2]
    rows = (saved.new_empty(0 if weight is None else saved.shape[1]) for weight in weights)
    return (*rows, *_fake_gradients(*inputs[OPERANDS:]))


def gradients_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the inputs: tensors as saved tensors, and the rest as it is."""
    ctx.settings = tuple(part for part in inputs if part is not None and not isinstance(part, Tensor))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(part for part in inputs if part is None or isinstance(part, Tensor)))


def statistics_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs and the last output, which is for the later passes only and carries no gradient."""
    gradients_context(ctx, (*inputs, output[-1]), output)
    ctx.mark_non_differentiable(output[-1])


def statistics_backward(
    ctx: Any, cotangents: Sequence[Tensor | None], apply: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    *operands, positives, exclude, saved = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:OPERANDS])
    present = (True, positives is not None, operands[4] is not None)
    weights = (
        None if not here else torch.zeros_like(saved[0]) if weight is None else weight
        for here, weight in zip(present, cotangents, strict=False)
    )
    # lse enters as a constant: what the gradients owe to its dependence on the operands is already in the
    # curvature.
    found = apply(*weights, *operands, positives, exclude, saved.detach(), *ctx.settings, needs)
    grads = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - OPERANDS))


def gradients_backward(
    ctx: Any, tangents: Sequence[Tensor | None], apply: Callable[..., tuple[Tensor, ...]]
) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    weights, operands = inputs[:WEIGHTS], inputs[WEIGHTS : WEIGHTS + OPERANDS]
    *settings, wanted = ctx.settings
    needs = tuple(ctx.needs_input_grad[WEIGHTS : WEIGHTS + OPERANDS])
    tangents = [tangent if asked else None for tangent, asked in zip(tangents, wanted, strict=True)]
    found = apply(*tangents, *inputs, *settings, needs)
    rows = (None if weight is None else row for weight, row in zip(weights, found[:WEIGHTS], strict=True))
    grads = (grad if need else None for grad, need in zip(found[WEIGHTS:], needs, strict=True))
    return (*rows, *grads, *(None,) * (len(ctx.needs_input_grad) - WEIGHTS - len(operands)))


class ReverseFunction(torch.autograd.Function):
    """What the functions here share: forward mode raises, and so does a derivative that no subclass has; vmap makes one
    call an example, because the kernels fill a device with one problem already.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # torch asks `inspect` for the signature at every call otherwise, 30 of its 45 us.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(THIRD_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(FORWARD_MODE)

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, ...]:
        if info.batch_size == 0:
            raise ValueError(
                "fastgessl.kernels: vmap over a batch of 0 examples has no result. Leave the empty batch out."
            )
        examples = (
            [
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            for i in range(info.batch_size)
        )
        outputs = zip(*(cls.apply(*example) for example in examples), strict=True)
        stacked = tuple(torch.stack(output) for output in outputs)
        return stacked, (0,) * len(stacked)


def nested(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    context: Callable[..., None] = ReverseFunction.setup_context,
    backward: Callable[..., Any] = ReverseFunction.backward,
    derivatives: Sequence[tuple[Any, Any]] = (),
) -> tuple[Any, Any]:
    """The operator `name`, for torch.compile, and a function of the same body, for eager code: functorch levels unwrap it.

    `backward(ctx, cotangents, *calls)` computes with `derivatives`, pairs that this function gave, as operators or as
    functions. Without it a derivative raises.
    """
    operator = custom_op(f"fastgessl::{name}", body, mutates_args=())
    operators = [derivative for derivative, _ in derivatives]
    calls = [function.apply for _, function in derivatives]

    def forward(*inputs):
        # For ordinary tensors the body is called as it is, which saves 80 us of dispatch a call.
        kinds = (type(part) for part in inputs if isinstance(part, Tensor))
        ordinary = all(kind in (Tensor, torch.nn.Parameter) for kind in kinds)
        return (body if ordinary else operator)(*inputs)

    def through_operators(ctx, *cotangents):
        return backward(ctx, cotangents, *operators)

    def through_functions(ctx, *cotangents):
        return backward(ctx, cotangents, *calls)

    operator.register_fake(fake)
    operator.register_autograd(through_operators, setup_context=context)
    methods = {"forward": forward, "setup_context": context, "backward": through_functions}
    title = name.title().replace("_", "")
    return operator, type(
        title, (ReverseFunction,), {key: staticmethod(method) for key, method in methods.items()}
    )


curvature, Curvature = nested("similarity_curvature", curvature_body, _fake_curvature)
gradients, Gradients = nested(
    "similarity_gradients",
    gradients_body,
    _fake_gradients,
    gradients_context,
    gradients_backward,
    [(curvature, Curvature)],
)
statistics, Statistics = nested(
    "similarity_statistics",
    statistics_body,
    _fake_statistics,
    statistics_context,
    statistics_backward,
    [(gradients, Gradients)],
)


def compiled(*operands: Tensor | None) -> bool:
    """Whether torch.compile is tracing, where the operators themselves are to be called. Raises RuntimeError if it traces
    forward mode, whose tangents registered autograd would drop, for a derivative of 0 (torch 2.15).
    """
    if not torch.compiler.is_compiling():
        return False
    if any(operand is not None and unpack_dual(operand).tangent is not None for operand in operands):
        raise RuntimeError(FORWARD_MODE)
    return True
