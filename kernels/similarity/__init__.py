"""Tables of similarities in blocks: their losses and derivatives, never stored whole."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastgessl.kernels.similarity.autograd import Statistics, compiled, statistics
from fastgessl.kernels.similarity.problem import Side
from fastgessl.kernels.similarity.ring import RingStatistics


def similarity_statistics(
    student: Side,
    teacher: Side | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    entropy: bool,
    implementation: str,
    ring: ProcessGroup | None = None,
    tied: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, positive and cross term, (M,) each, twice differentiable in all operands; see `similarity.problem` for their
    definitions.

    `positive` is empty without positives, the cross term without a teacher. With `ring`, keys and biases are this rank's
    shard of all, and column numbers are global. `tied`: the student's key is its query, which saves two of the backward's
    four matmul units on a GPU.
    """
    key = None if tied and ring is None else student.key
    operands = (student.query, key, student.scale, student.bias, *(teacher or (None,) * 4))
    if ring is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "fastgessl.kernels: the ring cannot be compiled with fullgraph=True. Call the loss outside torch.compile."
            )
        return RingStatistics.apply(*operands, positives, exclude, entropy, implementation, ring)[:3]
    call = statistics if compiled(*operands) else Statistics.apply
    return call(*operands, positives, exclude, entropy, implementation)[:3]
