"""Checks of what a user passes: each refusal is a ValueError that names the argument, what was found and what
is wanted.

Shapes, dtypes and devices are checked, and values (indices in range, positive temperature), in eager code, under vmap and
in compiled code. On a CUDA device value checks are asynchronous assertions, so that nothing waits for the GPU; of a step
on 256 rows they would still be most of the launches, so what the library makes itself is not checked.
"""

import math

import torch
from torch import Tensor
from torch.library import custom_op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
MODES = ("gather", "ring")


def matmul_dtype(operand: Tensor) -> torch.dtype:
    """The dtype in which a matmul would take the operand: autocast's, where that is on and the operand is not
    float64.
    """
    device = operand.device.type
    if operand.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return operand.dtype
    return torch.get_autocast_dtype(device)


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


def operands_of(
    query: Tensor, key: Tensor, names: tuple[str, str] = ("query", "key")
) -> tuple[Tensor, Tensor]:
    """Both, checked as by `check_pair`; under autocast in the dtype that a matmul would take, while their gradients come
    back in their own.
    """
    check_pair(query, key, names)
    return query.to(matmul_dtype(query)), key.to(matmul_dtype(key))


def check_choices(reduction: str, mode: str) -> None:
    """Known names only."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, found {reduction!r}.")


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
        return _checked(temperature.to(wide).reciprocal(), name)
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


def bias_of(bias: Tensor | None, key: Tensor, name: str = "bias") -> Tensor | None:
    """(N,): one number a key, in the dtype in which statistics are kept; differentiable."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise ValueError(f"{name} must be a tensor, found {type(bias).__name__}.")
    if bias.shape != key.shape[:1] or bias.dtype not in DTYPES or bias.device != key.device:
        raise ValueError(
            f"{name} must hold one floating number a key, shape ({len(key)},) on {key.device}; "
            f"found {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}."
        )
    return _checked(bias.to(torch.float64 if key.dtype == torch.float64 else torch.float32), name)


def positives_of(positives: Tensor | None, query: Tensor, keys: int, rank: int = 0, size: int = 1) -> Tensor:
    """(M,) int64: the given positives, or this rank's own columns, which begin at rank · keys of all size · keys."""
    if positives is None:
        if len(query) > keys:
            raise ValueError(
                f"positives must be given when there are more rows ({len(query)}) than keys ({keys}): by "
                "default row i's positive is key i."
            )
        return torch.arange(rank * keys, rank * keys + len(query), device=query.device)
    _check_index(positives, query, "positives")
    if positives.dim() != 1:
        raise ValueError(f"positives must have shape ({len(query)},), found {tuple(positives.shape)}.")
    return _checked(positives, "positives", size * keys)


def exclude_of(exclude: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """(M, 1) or (M, 2) int64 of `keys` columns, -1 = none."""
    if exclude is None:
        return None
    _check_index(exclude, query, "exclude")
    columns = exclude[:, None] if exclude.dim() == 1 else exclude
    if columns.dim() != 2 or columns.shape[1] not in (1, 2):
        raise ValueError(
            f"exclude must have shape ({len(query)},) or ({len(query)}, 2), found {tuple(exclude.shape)}."
        )
    return _checked(columns, "exclude", keys)


def _check_index(index: Tensor, query: Tensor, name: str) -> None:
    if not isinstance(index, Tensor):
        raise ValueError(f"{name} must be a tensor of int64, found {type(index).__name__}.")
    if index.dtype != torch.int64 or index.device != query.device or index.shape[:1] != query.shape[:1]:
        raise ValueError(
            f"{name} must be int64, one entry a row ({len(query)} rows) on {query.device}; "
            f"found {index.dtype} of shape {tuple(index.shape)} on {index.device}."
        )


def _checked(value: Tensor, name: str, keys: int = 0) -> Tensor:
    """A user's tensor, once its values have been looked at."""
    if torch.compiler.is_compiling():
        return _checked_when_compiled(value, name, keys)
    plain = value
    while torch._C._functorch.is_functorch_wrapped_tensor(plain):
        # Under vmap only what is beneath has values that can be read; that all examples together have to pass.
        plain = torch._C._functorch.get_unwrapped(plain)
    check_values(plain, name, keys)
    return value


def check_values(value: Tensor, name: str, keys: int) -> None:
    """Indices in [-1, keys), biases without infinities, scales positive and finite.

    NaN is let through in queries, keys and biases: it gives NaN, visibly. A centre or a Sinkhorn potential is NaN as soon
    as one row is.
    """
    shown = f"{name} of shape {tuple(value.shape)}"
    if not value.is_floating_point():
        low, high = value.aminmax()
        _require((low >= -1) & (high < keys), f"{shown} must lie in [-1, {keys})", low, high)
    elif name.endswith("bias"):
        infinite = value.isinf().sum()
        _require(
            infinite == 0,
            f"{shown} must not be infinite (-1e4 switches a column off), infinite entries",
            infinite,
        )
    elif value.is_cuda:
        _require((value > 0) & value.isfinite(), f"{name} must be positive and finite")
    elif not ((value > 0) & value.isfinite()).all():
        raise ValueError(f"{name} must be positive and finite, found {value.reciprocal().tolist()}.")


def _require(holds: Tensor, message: str, *found: Tensor) -> None:
    if holds.is_cuda:
        torch._assert_async(holds.all() if holds.dim() else holds, message)
    elif not holds.all():
        raise ValueError(f"{message}, found {[part.item() for part in found]}.")


@custom_op("fastgessl::checked", mutates_args=())
def _checked_when_compiled(value: Tensor, name: str, keys: int) -> Tensor:
    """An operator whose result is the value, so that a compiler neither looks into the check nor drops it."""
    check_values(value, name, keys)
    return value.clone()


_checked_when_compiled.register_fake(lambda value, name, keys: torch.empty_like(value))
_checked_when_compiled.register_autograd(lambda ctx, gradient: (gradient, None, None))
