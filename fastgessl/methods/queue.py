"""A queue of embeddings of earlier batches, alike on every rank."""

import torch
from torch import Tensor

from fastgessl.config import UsageError
from fastgessl.distributed import world_group
from fastgessl.kernels.collectives import all_gather_rows
from fastgessl.methods.base import RunFacts


@torch.no_grad()
def enqueued(queue: Tensor, rows: Tensor) -> Tensor:
    """A queue (V, L, D) after the rows (V, N, D) of every rank, rank by rank: a new tensor with the newest L
    rows, oldest first.

    >>> enqueued(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[[4.0], [5.0]]])).flatten().tolist()
    [3.0, 4.0, 5.0]
    """
    rows = (
        all_gather_rows(rows.transpose(0, 1).contiguous(), world_group(), "queue").transpose(0, 1).to(queue)
    )
    return torch.cat([queue[:, rows.shape[1] :], rows[:, -queue.shape[1] :]], dim=1)


def check_queue(option: str, length: int, facts: RunFacts) -> None:
    """Raise UsageError unless the queue holds a whole number of batches (He et al., CVPR 2020, and every code
    after it).
    """
    batch = facts.images_per_forward
    if length % batch:
        near = max(round(length / batch), 1) * batch
        raise UsageError(
            f"{option} {length} does not hold a whole number of batches of {batch} images. "
            f"Set --{option} {near}, or a batch size that divides it."
        )
