"""The softmax over similarities with keys that stay sharded: every rank's keys travel once around the ring,
to second order.

Forward: the shards' statistics merge by log-add-exp. Backward: each shard sees the global lse, and the keys'
gradients travel with the keys until they are home. Double backward: one round sums the row moments over all
shards, a second one the gradients. No rank ever holds more than two shards of keys; the next one is under way
while this one is computed on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgessl.kernels.collectives import check_equal_rows, rank_and_size
from fastgessl.kernels.similarity.autograd import (
    OPERANDS,
    WEIGHTS,
    ReverseFunction,
    contiguous,
    gradients_backward,
    gradients_context,
    implementation_module,
    packed,
    present,
    sides_of,
    statistics_backward,
    statistics_context,
    unpacked,
)
from fastgessl.kernels.similarity.chunked import accumulation_dtype, row_derivatives
from fastgessl.kernels.similarity.problem import Moments, RowStatistics, RowWeights, Side, SideValues

TRAVELLERS = (1, 3, 5, 7)
"""The operands that belong to keys: key and bias of both sides."""


def _pass_on(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Send to the next rank and receive from the previous one; the call that is returned waits and gives what
    came.
    """
    rank, size = rank_and_size(group)
    ahead, behind = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    outgoing = [tensor.contiguous() for tensor in tensors]
    if size == 1 or not outgoing:
        # A rank alone is its own neighbour, and gloo has no connection from a rank to itself.
        return lambda: outgoing
    incoming = [torch.empty_like(tensor) for tensor in outgoing]
    operations = [dist.P2POp(dist.isend, tensor, ahead, group) for tensor in outgoing]
    operations += [dist.P2POp(dist.irecv, tensor, behind, group) for tensor in incoming]
    works = dist.batch_isend_irecv(operations)

    def arrived() -> list[Tensor]:
        for work in works:
            work.wait()
        del outgoing[:]  # until here what is being sent had to stay alive
        return incoming

    return arrived


def _around(
    parts: Sequence[Tensor | None], group: dist.ProcessGroup
) -> Iterator[tuple[int, list[Tensor | None]]]:
    """(owner, its parts) for every rank, this one first. The next parts travel while the caller works on
    these.
    """
    rank, size = rank_and_size(group)
    travelling = [part for part in parts if part is not None]
    for step in range(size):
        arrived = _pass_on(travelling, group) if step < size - 1 else None
        rest = iter(travelling)
        yield (rank - step) % size, [None if part is None else next(rest) for part in parts]
        if arrived is not None:
            travelling = arrived()


class _Homeward:
    """Sums that travel with the shards: after one round each is complete and back at its owner."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.arrived: Callable[[], list[Tensor]] | None = None

    def add(self, parts: Sequence[Tensor | None]) -> None:
        shares = [part.to(accumulation_dtype(part.dtype)) for part in parts if part is not None]
        if self.arrived is not None:
            shares = [sum_ + share for sum_, share in zip(self.arrived(), shares, strict=True)]
        self.arrived = _pass_on(shares, self.group)

    def collect(self) -> list[Tensor]:
        return [] if self.arrived is None else self.arrived()


def _local(indices: Tensor | None, owner: int, keys: int) -> Tensor | None:
    """Global column numbers as those of one shard, -1 where they lie elsewhere."""
    if indices is None:
        return None
    shifted = indices - owner * keys
    return shifted.masked_fill((shifted < 0) | (shifted >= keys), -1)


def _with_keys(operands: Sequence[Any], travelled: Sequence[Any]) -> list[Any]:
    merged = list(operands)
    for index, part in zip(TRAVELLERS, travelled, strict=True):
        merged[index] = part
    return merged


def _merged(total: RowStatistics, shard: RowStatistics, entropy: bool) -> RowStatistics:
    """RowStatistics over the union of two sets of columns."""
    lse, correction = _joined(total.lse, total.correction, shard.lse, shard.correction)
    teacher_lse, teacher_correction = _joined(
        total.teacher_lse, total.teacher_correction, shard.teacher_lse, shard.teacher_correction
    )
    finite = teacher_lse.masked_fill(teacher_lse == -torch.inf, 0.0)
    mean = torch.zeros_like(finite)
    for part in (total, shard):
        mean += (
            (part.teacher_lse - finite).exp()
            / part.teacher_correction
            * teacher_correction
            * part.teacher_mean
        )
    cross_term = (mean - teacher_lse if entropy else mean).masked_fill(teacher_lse == -torch.inf, 0.0)
    return RowStatistics(
        lse, total.positive + shard.positive, cross_term, correction, teacher_lse, teacher_correction, mean
    )


def _joined(
    lse: Tensor, correction: Tensor, other_lse: Tensor, other_correction: Tensor
) -> tuple[Tensor, Tensor]:
    """lse and correction of two sets of columns together; exp(lse)/correction is a set's sum."""
    joined = torch.logaddexp(lse, other_lse)
    finite = joined.masked_fill(joined == -torch.inf, 0.0)
    total = (lse - finite).exp() / correction + (other_lse - finite).exp() / other_correction
    return joined, total.reciprocal().masked_fill_(total == 0, 1.0)


class RingStatistics(ReverseFunction):
    """`Statistics` over all ranks' keys. Inputs: the eight operands, positives and exclude in global columns, entropy,
    implementation, group.
    """

    @staticmethod
    def forward(*inputs):
        operands = contiguous(inputs[:OPERANDS])
        positives, exclude, entropy, implementation, group = inputs[OPERANDS:]
        keys, (rank, _) = len(operands[1]), rank_and_size(group)
        check_equal_rows(operands[1], group, "key")
        module, total = implementation_module(implementation), RowStatistics(*(operands[2].new_empty(0),) * 7)
        for owner, travelled in _around([operands[index] for index in TRAVELLERS], group):
            sides = sides_of(_with_keys(operands, travelled))
            shard = module.statistics(
                *sides, _local(positives, owner, keys), _local(exclude, owner, keys), entropy
            )
            total = shard if owner == rank else _merged(total, shard, entropy)
        return *total[:3], packed(total)

    setup_context = staticmethod(statistics_context)

    @staticmethod
    def backward(ctx, *cotangents):
        return statistics_backward(ctx, cotangents, RingGradients.apply)


class RingGradients(ReverseFunction):
    """`Gradients` with travelling keys: of the sum of all ranks' losses to this rank's keys, of this rank's
    to its queries.
    """

    @staticmethod
    def forward(*inputs):
        weights, operands = contiguous(inputs[:WEIGHTS]), contiguous(inputs[WEIGHTS : WEIGHTS + OPERANDS])
        positives, exclude, saved, entropy, implementation, group, needs = inputs[WEIGHTS + OPERANDS :]
        module, keys, saved = implementation_module(implementation), len(operands[1]), unpacked(saved)
        rows, home, sums = RowWeights(*present(weights, saved.lse)), _Homeward(group), None
        for owner, travelled in _around([operands[index] for index in TRAVELLERS], group):
            sides = sides_of(_with_keys(operands, travelled))
            shard = (_local(positives, owner, keys), _local(exclude, owner, keys))
            student, teacher = module.gradients(
                rows, *sides, *shard, saved, entropy, tuple(needs[:4]), tuple(needs[4:])
            )
            sums = _collect((*student, *teacher), sums, home)
        return _assembled(sums, home, operands, needs)

    setup_context = staticmethod(gradients_context)

    @staticmethod
    def backward(ctx, *tangents):
        return gradients_backward(ctx, tangents, RingCurvature.apply)


def _collect(
    parts: Sequence[Tensor | None], sums: list[Tensor | None] | None, home: _Homeward
) -> list[Tensor | None]:
    """Send the keys' shares on their way home; add the others to the sums."""
    home.add([parts[index] for index in TRAVELLERS])
    staying = [
        None if part is None or index in TRAVELLERS else part.to(accumulation_dtype(part.dtype))
        for index, part in enumerate(parts)
    ]
    if sums is None:
        return staying
    return [None if a is None or b is None else a + b for a, b in zip(sums, staying, strict=True)]


def _assembled(
    sums: list[Tensor | None] | None,
    home: _Homeward,
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    arrived = iter(home.collect())
    found = list(sums or ())
    for index in TRAVELLERS:
        found[index] = next(arrived) if needs[index] else None
    like = next(operand for operand in operands if operand is not None)
    rounded = (
        None if part is None or operand is None else part.to(operand.dtype)
        for part, operand in zip(found, operands, strict=True)
    )
    return present(tuple(rounded), like)


class RingCurvature(ReverseFunction):
    """`Curvature` with travelling keys; its own derivative raises."""

    @staticmethod
    def forward(*inputs):
        tangents, weights = contiguous(inputs[:OPERANDS]), contiguous(inputs[OPERANDS : OPERANDS + WEIGHTS])
        operands = contiguous(inputs[OPERANDS + WEIGHTS : 2 * OPERANDS + WEIGHTS])
        positives, exclude, saved, entropy, implementation, group, needs = inputs[2 * OPERANDS + WEIGHTS :]
        module, keys, saved = implementation_module(implementation), len(operands[1]), unpacked(saved)
        rows = RowWeights(*present(weights, saved.lse))
        travellers = [*(operands[index] for index in TRAVELLERS), *(tangents[index] for index in TRAVELLERS)]

        def shards() -> Iterator[
            tuple[
                tuple[SideValues, SideValues], tuple[Side, Side | None], tuple[Tensor | None, Tensor | None]
            ]
        ]:
            for owner, travelled in _around(travellers, group):
                here, moved = _with_keys(operands, travelled[:4]), _with_keys(tangents, travelled[4:])
                indices = _local(positives, owner, keys), _local(exclude, owner, keys)
                yield (SideValues(*moved[:4]), SideValues(*moved[4:])), sides_of(here), indices

        moments: Moments | None = None
        for moved, sides, indices in shards():
            part, _, _ = module.curvature(
                *moved, rows, *sides, *indices, saved, entropy, (False,) * 4, (False,) * 4
            )
            moments = (
                part if moments is None else Moments(*(a + b for a, b in zip(moments, part, strict=True)))
            )
        assert moments is not None
        if not any(needs):
            return (*row_derivatives(moments), *present((None,) * OPERANDS, saved.lse))
        home, sums = _Homeward(group), None
        for moved, sides, indices in shards():
            _, student, teacher = module.curvature(
                *moved, rows, *sides, *indices, saved, entropy, tuple(needs[:4]), tuple(needs[4:]), moments
            )  # fmt: skip
            sums = _collect((*student, *teacher), sums, home)
        return (*row_derivatives(moments), *_assembled(sums, home, operands, needs))
