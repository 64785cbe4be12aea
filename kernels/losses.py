"""The losses: streaming, twice differentiable in everything, in any floating dtype, over one device or a
group of ranks.

Common to all. Operands are matrices (rows, features) of float64, float32, bfloat16 or float16; statistics and
results are float32 (float64 for float64). Nothing is normalised unless the docstring says so. `temperature`
is a number or a 0-d tensor that may need a gradient. `positives` (M,) and `exclude` (M,) or (M, 2) are int64
column numbers, -1 = none; a row without a positive, or with every column excluded, has zero loss and zero
gradient and is still counted by reduction "mean" (the others: "sum", "none"). NaN in an operand gives NaN.
Under torch.autocast operands are cast as those of a matmul, and may come in different dtypes.

With `group`, a process group, keys are those of all ranks and column numbers are global (rank r's own keys
start at r·N); each rank gets the loss of its own rows, and DDP's averaging gives the gradient of the global
mean. mode "gather" gives each rank a copy of all keys; "ring" passes them around. `implementation` forces
"reference", "chunked" or "triton". Shapes, dtypes, devices, indices and temperatures that do not fit raise
ValueError; third derivatives raise RuntimeError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import normalize

from fastgessl.kernels import reference
from fastgessl.kernels.backend import as_matmul, dense, implementation_for
from fastgessl.kernels.checks import (
    Given,
    check_bias,
    check_choices,
    check_pair,
    checked,
    exclude_of,
    positives_of,
    scale_of,
)
from fastgessl.kernels.collectives import all_gather_rows, rank_and_size
from fastgessl.kernels.similarity.autograd import similarity_statistics
from fastgessl.kernels.similarity.chunked import Side
from fastgessl.kernels.similarity.symmetric import symmetric_info_nce

Temperature = float | Tensor

LARGEST_STORED_CLIP = 1 << 18
"""Chunked, both directions share a table: at 512 x 512 it takes 1.2, 1.1 and 1.6 times as long as the stored
one (forward, with backward, with double backward), at 1,024 x 1,024 0.6, 0.9 and 1.1."""

How = tuple[ProcessGroup | None, str, str | None]
"""group, mode, implementation"""


def chosen_for(
    query: Tensor, key: Tensor, exclude: Tensor | None, how: How, largest: float = math.inf
) -> str:
    """The implementation's name. Only a table of one process without excluded columns is ever worth storing,
    if not above `largest`.
    """
    group, _, implementation = how
    entries = len(query) * len(key)
    storable = group is None and exclude is None and entries <= largest
    return implementation_for(query, implementation, entries if storable else math.inf)[0]


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """(M,) -> () or (M,). The mean counts ignored rows."""
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def gathered(
    key: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    group: ProcessGroup | None,
    mode: str,
    implementation: str,
    name: str = "key",
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """Keys and column bias (in the dtype of the statistics) as the operators want them, and the group if they
    are to travel in a ring.

    The dense reference gathers always.
    """
    wide = None if bias is None else bias.to(scale.dtype)
    if group is not None and mode == "ring" and implementation != "reference":
        return key, wide, group
    return (
        all_gather_rows(key, group, name),
        None if wide is None else all_gather_rows(wide, group, "bias"),
        None,
    )


def where_columns_are_left(values: Tensor, lse: Tensor, exclude: Tensor | None) -> Tensor:
    """0 in rows whose columns are all excluded."""
    return values if exclude is None else values.masked_fill(lse == -torch.inf, 0.0)


def contrastive_rows(
    lse: Tensor, positive: Tensor, positives: Tensor, exclude: Tensor | None, given: Given
) -> Tensor:
    """InfoNCE of each row; 0 where there is no positive or no column, as only given indices have it."""
    rows = where_columns_are_left(lse - positive, lse, exclude if given.exclude else None)
    return rows.masked_fill(positives < 0, 0.0) if given.positives else rows


def similarity_logsumexp(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """lse_i = log Σ_j exp(q_i·k_j/τ + bias_j), the primitive that other losses are composed from.  (M, D),
    (N, D), bias (N,) -> (M,).

    A row with every column excluded gives -inf, the logarithm of an empty sum, with zero gradient.

    >>> import torch
    >>> similarity_logsumexp(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor([1.3133, 1.3133])
    """
    check_pair(query, key)
    check_bias(bias, key)
    check_choices("none", mode)
    query, key = as_matmul(query, key)
    given = Given(scale=isinstance(temperature, Tensor), bias=bias is not None, exclude=exclude is not None)
    scale, excluded = scale_of(temperature, query), exclude_of(exclude, query)
    return logsumexp_rows(query, key, scale, bias, excluded, (group, mode, implementation), given)


def logsumexp_rows(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
    how: How,
    given: Given,
) -> Tensor:
    """`similarity_logsumexp` of operands whose shapes are checked."""
    group, mode, _ = how
    name = chosen_for(query, key, exclude, how)
    key, bias, ring = gathered(key, bias, scale, group, mode, name)
    if name == "reference":
        scale = checked(scale, None, bias, None, None, exclude, len(key), given)
        return dense(reference.similarity_logsumexp, query, key, scale.reciprocal(), bias, exclude)
    return similarity_statistics(
        Side(query, key, scale, bias), None, None, exclude, False, name, given, ring
    )[0]


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """-log( exp(q_i·k_pos/τ) / Σ_j exp(q_i·k_j/τ) ), van den Oord et al. 2018, eq. (4).  (M, D), (N, D) -> ()
    or (M,).

    Without `positives` row i's positive is key i. The sum runs over the columns that are not excluded; an
    excluded positive leaves the sum but stays the positive (decoupled contrastive loss).

    >>> import torch
    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    check_pair(query, key)
    check_choices(reduction, mode)
    query, key = as_matmul(query, key)
    rank, _ = rank_and_size(group)
    given = Given(
        scale=isinstance(temperature, Tensor), positives=positives is not None, exclude=exclude is not None
    )
    scale, excluded = scale_of(temperature, query), exclude_of(exclude, query)
    positives = positives_of(positives, query, len(key), first=rank * len(key))
    rows = _info_nce_rows(query, key, scale, positives, excluded, (group, mode, implementation), given)
    return reduced(rows, reduction)


def _info_nce_rows(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    positives: Tensor,
    exclude: Tensor | None,
    how: How,
    given: Given,
    owner: str = "key",
) -> Tensor:
    group, mode, _ = how
    name = chosen_for(query, key, exclude, how)
    key, _, ring = gathered(key, None, scale, group, mode, name, owner)
    if name == "reference":
        scale = checked(scale, None, None, None, positives, exclude, len(key), given)
        return dense(reference.info_nce, query, key, scale.reciprocal(), positives, exclude)
    student = Side(query, key, scale, None)
    lse, positive, _ = similarity_statistics(
        student, None, positives, exclude, False, name, given, ring, tied=key is query
    )
    return contrastive_rows(lse, positive, positives, exclude, given)


def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Temperature = 0.5,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """SimCLR's loss, Chen et al. 2020, eq. (1), over the 2N rows of both views; normalises them.  (N, D)
    twice -> () or (2N,).

    A row's positive is its image's other view; the row itself is excluded, the other 2N - 1 stay.

    >>> import torch
    >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.5514)
    """
    check_pair(view1, view2, ("view1", "view2"))
    if view1.shape != view2.shape:
        raise ValueError(
            f"view1 and view2 must hold the same images; found shapes {tuple(view1.shape)} and "
            f"{tuple(view2.shape)}."
        )
    check_choices(reduction, mode)
    wide = torch.float64 if view1.dtype == torch.float64 else torch.float32
    rows = normalize(torch.cat([view1, view2]).to(wide), dim=1).to(view1.dtype)
    (rows,) = as_matmul(rows)
    first = rank_and_size(group)[0] * len(rows)
    own = torch.arange(first, first + len(rows), device=rows.device)
    scale, given = scale_of(temperature, rows), Given(scale=isinstance(temperature, Tensor))
    losses = _info_nce_rows(
        rows, rows, scale, own.roll(len(view1)), own[:, None], (group, mode, implementation), given, "view1"
    )
    return reduced(losses, reduction)


def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: Temperature,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    mode: str = "gather",
    implementation: str | None = None,
) -> Tensor:
    """Mean of InfoNCE from image to text and from text to image, Radford et al. 2021, fig. 3.  (N, D) twice
    -> () or (N,).

    >>> import torch
    >>> clip_loss(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    check_pair(image, text, ("image", "text"))
    if image.shape != text.shape:
        raise ValueError(
            f"image and text must be paired row by row; found shapes {tuple(image.shape)} and "
            f"{tuple(text.shape)}."
        )
    check_choices(reduction, mode)
    image, text = as_matmul(image, text)
    scale, how, given = (
        scale_of(temperature, image),
        (group, mode, implementation),
        Given(scale=isinstance(temperature, Tensor)),
    )
    name = chosen_for(image, text, None, how, LARGEST_STORED_CLIP)
    if group is None and name == "reference":
        scale = checked(scale, None, None, None, None, None, len(text), given)
        return reduced(dense(reference.clip_loss, image, text, scale.reciprocal()), reduction)
    if group is None:
        return reduced(symmetric_info_nce(image, text, scale, name, given), reduction)
    rank, _ = rank_and_size(group)
    positives = positives_of(None, image, len(text), first=rank * len(text))
    to_text = _info_nce_rows(image, text, scale, positives, None, how, given, "text")
    to_image = _info_nce_rows(text, image, scale, positives, None, how, given, "image")
    return reduced((to_text + to_image) / 2, reduction)
