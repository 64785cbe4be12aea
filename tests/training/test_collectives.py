"""64 ranks in one process: every rank asks for the same collectives in the same order, and for as many bytes
as docs/scaling.md says. What this process sends is written down and goes nowhere, by torch's own fake group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small_training import METHOD
from smooth_toys import toy_backbone
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastgessl.config import GesslConfig, MethodConfig
from fastgessl.methods import METHODS, RunFacts, build_method
from fastgessl.models import synchronise_batch_norm
from fastgessl.objective import GeSSL
from fastgessl.objective.gradient_cache import CachedObjective

RANKS, IMAGES, WIDTH = 64, 4, METHOD["projector_out"]


class Call(NamedTuple):
    """One collective, and the bytes that this rank puts in."""

    name: str
    nbytes: int


def _sent(operations: list[dist.P2POp], rank: int) -> list[Call]:
    """Who is sent what; every send has a receive of its size."""
    sent = [operation for operation in operations if operation.op is dist.isend]
    received = [operation for operation in operations if operation.op is dist.irecv]
    assert [tuple(one.tensor.shape) for one in sent] == [tuple(one.tensor.shape) for one in received]
    size = dist.get_world_size()
    assert {one.peer for one in sent} <= {(rank + 1) % size} and {one.peer for one in received} <= {
        (rank - 1) % size
    }
    for one in received:
        one.tensor.zero_()
    return [Call("pass on", sum(one.tensor.nbytes for one in sent))]


@contextmanager
def recording(rank: int, size: int) -> Iterator[list[Call]]:
    """Inside, this process is rank `rank` of `size`, all of which hold what it holds. The list grows with its
    collectives.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    calls: list[Call] = []

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> None:
        calls.append(Call("all-reduce", tensor.nbytes))
        tensor.mul_(size)

    def all_gather(output: Tensor, given: Tensor, *_: Any, **__: Any) -> None:
        calls.append(Call("all-gather", given.nbytes))
        output.copy_(given.repeat(size, *[1] * (given.dim() - 1)))

    def reduce_scatter(output: Tensor, given: Tensor, *_: Any, **__: Any) -> None:
        calls.append(Call("reduce-scatter", given.nbytes))
        output.copy_(given.chunk(size)[rank] * size)

    def pass_on(operations: list[dist.P2POp]) -> list[Any]:
        calls.extend(_sent(operations, rank))
        return []

    patched = {
        "all_reduce": all_reduce,
        "all_gather_into_tensor": all_gather,
        "reduce_scatter_tensor": reduce_scatter,
        "batch_isend_irecv": pass_on,
    }
    try:
        with mock.patch.multiple(dist, **patched):
            yield calls
    finally:
        dist.destroy_process_group()


def under_ddp(module: nn.Module, calls: list[Call]) -> DistributedDataParallel:
    """The module in DDP, whose own all-reduces of gradient buckets are written down too."""
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)

    def note(state, bucket):  # DDP wants the annotation itself or none, not its text
        calls.append(Call("gradients", bucket.buffer().nbytes))
        summed: torch.futures.Future[Tensor] = torch.futures.Future()
        summed.set_result(bucket.buffer())
        return summed

    wrapped.register_comm_hook(None, note)
    return wrapped


def step(
    rank,
    name,
    *,
    negatives="global",
    exchange="gather",
    settings=None,
    synchronised=False,
    cached=False,
    size=RANKS,
):
    """(collectives of the forward, the backward and the update, trainable bytes) of one step on one rank of
    `size`.
    """
    with recording(rank, size) as calls:
        torch.manual_seed(0)
        facts = RunFacts(total_steps=10, images_per_forward=IMAGES * size, negatives=negatives, classes=4)
        queues = {key: METHOD[key] | {"queue_length": IMAGES * size} for key in ("moco", "swav")}
        config = MethodConfig(name=name, **METHOD | queues)
        method = build_method(config, toy_backbone(), facts)
        method.exchange = exchange
        if synchronised:
            synchronise_batch_norm(method)
        settings = settings or GesslConfig()
        objective = under_ddp(
            CachedObjective(method, settings, 2) if cached else GeSSL(method, settings), calls
        )
        calls.clear()
        views = [
            torch.randn(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(view)) for view in range(2)
        ]
        result = objective(views, labels=torch.arange(IMAGES))
        forward = list(calls)
        result.loss.backward()
        backward = calls[len(forward) :]
        calls_before = len(calls)
        method.update_state([(result.outputs, result.targets)], 0)
        trainable = sum(p.nbytes for p in method.parameters() if p.requires_grad)
        return forward, backward, calls[calls_before:], trainable


@pytest.mark.parametrize(
    "options", [{}, {"synchronised": True}, {"cached": True}], ids=["plain", "synchronised", "cached"]
)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_rank_asks_for_the_same_in_the_same_order(name, options):
    first, *others = (step(rank, name, **options) for rank in (0, 1, RANKS - 1))
    assert all(other == first for other in others)
    assert sum(call.nbytes for call in first[1] if call.name == "gradients") == first[3]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_task_of_gessl_is_rank_local_and_only_gradients_travel(name):
    forward, backward, _, trainable = step(
        5, name, negatives="local", settings=GesslConfig(w_sigma=1.0, inner_steps=1)
    )
    assert {call.name for call in forward + backward} == {"gradients"}
    assert sum(call.nbytes for call in backward) == trainable


def test_gathered_keys_cost_the_bytes_that_the_page_says():
    own = 2 * IMAGES * WIDTH * 4
    forward, backward, *_ = step(3, "simclr")
    assert forward == [Call("all-gather", 8), Call("all-gather", own)]  # the number of rows, and the rows
    assert backward[0] == Call("reduce-scatter", RANKS * own)


def test_passed_on_keys_cost_the_bytes_that_the_page_says():
    own = 2 * IMAGES * WIDTH * 4
    for rank in (0, 3, RANKS - 1):
        forward, backward, *_ = step(rank, "simclr", exchange="ring")
        assert forward == [Call("all-gather", 8), *[Call("pass on", own)] * (RANKS - 1)]
        passed = [call for call in backward if call.name == "pass on"]
        assert passed == [Call("pass on", own)] * (
            RANKS - 1 + RANKS
        )  # keys once around, and their gradients home


@pytest.mark.parametrize(("name", "exchanges"), [("simclr", 1), ("mocov3", 2), ("cissl", 1)])
def test_every_method_that_rings_passes_each_rank_s_keys_on_and_gathers_none(name, exchanges):
    gathered, passed = (step(0, name, exchange=exchange)[0] for exchange in ("gather", "ring"))
    keys = max(call.nbytes for call in gathered)
    assert gathered == [Call("all-gather", 8), Call("all-gather", keys)] * exchanges
    assert passed == [Call("all-gather", 8), *[Call("pass on", keys)] * (RANKS - 1)] * exchanges
