"""How many directions a batch of embeddings uses: collapse that a spread does not show."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def directions_of(projections: Tensor) -> Tensor:
    """(Σλ)² / Σλ² of the eigenvalues λ of the covariance of normalised projections (V, N, D), averaged over
    views: ().

    Between 1, all images on a line, and min(N - 1, D); 0 where all are one point. It needs the covariance's
    trace and norm alone: no eigenvalues, which would cost more than a narrow network's step (RankMe, Garrido
    et al. 2023, is measured at the end of a run).

    >>> line = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    >>> plane = torch.eye(3)[None]
    >>> round(directions_of(line).item(), 1), round(directions_of(plane).item(), 4)
    (1.1, 2.0)
    """
    rows = normalize(projections.detach().float(), dim=-1)
    rows = rows - rows.mean(1, keepdim=True)
    gram = rows @ rows.transpose(1, 2) if rows.shape[1] < rows.shape[2] else rows.transpose(1, 2) @ rows
    trace, square = gram.diagonal(dim1=1, dim2=2).sum(1), gram.square().sum((1, 2))
    return (trace.square() / square.clamp_min(torch.finfo(square.dtype).tiny)).mean()
