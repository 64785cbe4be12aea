"""Checks of what a user passes: each refusal is a ValueError that names the argument, what was found and what
is wanted.

Shapes, dtypes and devices are checked before an operator is called; values (indices in range, positive
temperature) inside it, where tensors are real under vmap and torch.compile too. On a CUDA device value checks
are asynchronous assertions, so that nothing waits for the GPU; of a step on 256 rows they would still be most
of the launches, so what the library makes itself is not checked.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgessl.kernels.backend import matmul_dtype
from fastgessl.kernels.similarity.chunked import Side

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
MODES = ("gather", "ring")


class Given(NamedTuple):
    """Which values a user passed as tensors: these alone are looked at. Numbers are checked as numbers, and
    made indices are right.
    """

    scale: bool = False
    teacher_scale: bool = False
    bias: bool = False
    teacher_bias: bool = False
    positives: bool = False
    exclude: bool = False


def check_pair(query: Tensor, key: Tensor, names: tuple[str, str] = ("query", "key")) -> None:
    """Two non-empty matrices with as many columns, on one device, of one dtype; under autocast, of dtypes
    that it makes one.
    """
    for name, tensor in zip(names, (query, key), strict=True):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, found {type(tensor).__name__}.")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must have two dimensions (rows, features), none of them 0; found shape "
                f"{tuple(tensor.shape)}."
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float64, float32, bfloat16 or float16, found {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
    shapes = f"{names[0]} {tuple(query.shape)}, {names[1]} {tuple(key.shape)}"
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"{names[0]} and {names[1]} must have as many features; found {shapes}.")
    if query.device != key.device or (query.dtype != key.dtype and matmul_dtype(query) != matmul_dtype(key)):
        found = f"{shapes}: {query.dtype} on {query.device} and {key.dtype} on {key.device}"
        raise ValueError(f"{names[0]} and {names[1]} must share dtype and device; found {found}.")


def check_teacher(student: Side, teacher: Side) -> None:
    """The teacher's table must be as large as the student's; its features may differ."""
    tables = [(len(side.query), len(side.key)) for side in (student, teacher)]
    if tables[0] != tables[1]:
        raise ValueError(
            f"student and teacher must have as many rows and as many keys; found (rows, keys) {tables[0]} "
            f"and {tables[1]}."
        )
    (dtype, device), (other_dtype, other_device) = (
        (side.query.dtype, side.query.device) for side in (student, teacher)
    )
    if (dtype, device) != (other_dtype, other_device):
        raise ValueError(
            f"student and teacher must share dtype and device; found {dtype} on {device} and {other_dtype} "
            f"on {other_device}."
        )


def scale_of(temperature: float | Tensor, query: Tensor, name: str = "temperature") -> Tensor:
    """1/τ as a 0-d tensor on the query's device, in the dtype in which statistics are kept; differentiable."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(
                f"{name} must be a number or a 0-d floating tensor, found {temperature.dtype} of shape "
                f"{tuple(temperature.shape)}."
            )
        if temperature.device != query.device:
            raise ValueError(
                f"{name} must be on {query.device} like the query, found it on {temperature.device}."
            )
        return temperature.to(wide).reciprocal()
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise ValueError(
            f"{name} must be a number or a 0-d floating tensor, found {type(temperature).__name__}."
        )
    # A comparison and not math.isfinite, which torch.compile cannot trace once a schedule has made the number
    # symbolic.
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} must be positive and finite, found {temperature}.")
    smallest, largest = torch.finfo(wide).tiny, torch.finfo(wide).max
    if not smallest <= 1 / temperature <= largest:
        raise ValueError(
            f"{name} must have an inverse that {wide} can hold, {smallest:.0e} to {largest:.0e}; found "
            f"{temperature}."
        )
    return torch.full((), 1 / temperature, dtype=wide, device=query.device)


def check_bias(bias: Tensor | None, key: Tensor, name: str = "bias") -> None:
    """One number a key."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise ValueError(f"{name} must be a tensor, found {type(bias).__name__}.")
    if bias.shape != key.shape[:1] or bias.dtype not in DTYPES or bias.device != key.device:
        raise ValueError(
            f"{name} must hold one floating number a key, shape ({len(key)},) on {key.device}; "
            f"found {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}."
        )


def check_index(index: Tensor, query: Tensor, name: str) -> None:
    """Column numbers, one or several a row."""
    if not isinstance(index, Tensor):
        raise ValueError(f"{name} must be a tensor of int64, found {type(index).__name__}.")
    if index.dtype != torch.int64 or index.device != query.device or index.shape[:1] != query.shape[:1]:
        raise ValueError(
            f"{name} must be int64, one entry a row ({len(query)} rows) on {query.device}; "
            f"found {index.dtype} of shape {tuple(index.shape)} on {index.device}."
        )


def positives_of(positives: Tensor | None, query: Tensor, keys: int, first: int = 0) -> Tensor:
    """(M,) int64: the given positives, or the columns first, first + 1, … of as many keys."""
    if positives is None:
        if len(query) > keys:
            raise ValueError(
                f"positives must be given when there are more rows ({len(query)}) than keys ({keys}): by "
                "default row i's positive is key i."
            )
        return torch.arange(first, first + len(query), device=query.device)
    check_index(positives, query, "positives")
    if positives.dim() != 1:
        raise ValueError(f"positives must have shape ({len(query)},), found {tuple(positives.shape)}.")
    return positives


def exclude_of(exclude: Tensor | None, query: Tensor) -> Tensor | None:
    """(M, 1) or (M, 2) int64 with -1 = none."""
    if exclude is None:
        return None
    check_index(exclude, query, "exclude")
    if exclude.dim() == 1:
        return exclude[:, None]
    if exclude.dim() != 2 or exclude.shape[1] not in (1, 2):
        raise ValueError(
            f"exclude must have shape ({len(query)},) or ({len(query)}, 2), found {tuple(exclude.shape)}."
        )
    return exclude


def check_choices(reduction: str, mode: str) -> None:
    """Known names only."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, found {reduction!r}.")


def _require(holds: Tensor, message: str, found: Sequence[Tensor]) -> None:
    if holds.is_cuda:
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(f"{message}, found {[part.item() for part in found]}.")


def check_values(
    scale: Tensor | None,
    teacher_scale: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    keys: int,
    given: Sequence[bool],
) -> None:
    """Positive temperatures, biases without infinities, indices in [-1, keys), of what is `Given`.

    NaN is let through in queries, keys and biases: it gives NaN, visibly. A centre or a Sinkhorn potential is
    NaN as soon as one row is.
    """
    values = (scale, teacher_scale, bias, teacher_bias, positives, exclude)
    scale, teacher_scale, bias, teacher_bias, positives, exclude = (
        value if asked else None for value, asked in zip(values, given, strict=True)
    )
    for name, value in (("temperature", scale), ("teacher_temperature", teacher_scale)):
        if value is not None and value.is_cuda:
            torch._assert_async((value > 0) & value.isfinite(), f"{name} must be positive and finite")
        elif value is not None and not 0 < value.item() < math.inf:
            raise ValueError(f"{name} must be positive and finite, found {value.reciprocal().item()}.")
    for name, column in (("bias", bias), ("teacher_bias", teacher_bias)):
        if column is not None:
            wrong = column.isinf().sum()
            message = f"{name} of shape {tuple(column.shape)} must not be infinite (-1e4 switches a column off), infinite entries"
            _require(wrong == 0, message, (wrong,))
    for name, index in (("positives", positives), ("exclude", exclude)):
        if index is not None:
            low, high = index.aminmax()
            _require(
                (low >= -1) & (high < keys),
                f"{name} of shape {tuple(index.shape)} must lie in [-1, {keys})",
                (low, high),
            )


def check_batch(size: int) -> None:
    """vmap calls the kernels once an example: without examples the results would have no shape."""
    if size == 0:
        raise ValueError(
            "fastgessl.kernels: vmap over a batch of 0 examples has no result. Leave the empty batch out."
        )


def signed_once(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A function that remembers the signature of its forward: torch asks `inspect` for it at every call
    otherwise, 30 of its 45 us.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


@signed_once
class CheckedScale(torch.autograd.Function):
    """The scale, once `check_values` has passed: a function, so that vmap hands over real values. Its
    derivative is the identity.
    """

    @staticmethod
    def forward(scale, *others):
        check_values(scale, *others)
        return scale.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.others = len(inputs) - 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(None,) * ctx.others

    @staticmethod
    def jvp(ctx, tangent, *others):
        return tangent.clone()

    @staticmethod
    def vmap(info, in_dims, *inputs):
        check_batch(info.batch_size)
        examples = (
            CheckedScale.apply(
                *(
                    part.select(dim, i) if isinstance(dim, int) else part
                    for part, dim in zip(inputs, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        )
        return torch.stack(list(examples)), 0


def checked(scale: Tensor, *others: Tensor | int | Given | None) -> Tensor:
    """The scale, once `check_values(scale, *others)` has passed, in every transform."""
    if not any(others[-1]):  # type: ignore[arg-type]
        return scale
    if torch._C._are_functorch_transforms_active():
        return CheckedScale.apply(scale, *others)
    # Outside of transforms tensors are real already, and an autograd function would cost 40 us: a sixth of a
    # 256 x 256 forward.
    check_values(scale, *others)  # type: ignore[arg-type]
    return scale
