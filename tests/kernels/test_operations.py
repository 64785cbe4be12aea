"""What a step asks of a device, counted by dispatch modes: operations, looks at values, copies that wait."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from interpreter import printed_by
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgessl.kernels import (
    NTXentLoss,
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    sigma_kl,
    similarity_logsumexp,
    sinkhorn_potentials,
    soft_cross_entropy,
    softmax_marginal,
)
from fastgessl.kernels.collectives import all_gather_rows, to_device
from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engines import Made, Setup
from fastgessl.pipelines.loader import Loader, Sampling
from fastgessl.pipelines.sources.images import ArrayImages


@pytest.fixture(scope="module")
def counts():
    return printed_by("count_operations.py")


def test_a_step_asks_for_at_most_one_operation_more_than_three_lines_of_pytorch(counts):
    assert len(counts["beside dense"]) == 12
    for case, (ours, dense) in counts["beside dense"].items():
        print(f"{case}: {sum(ours.values())} against {sum(dense.values())}")
        assert any(name.endswith("_kernel") for name in ours)
        assert sum(ours.values()) <= sum(dense.values()) + 1, (case, ours, dense)


def test_a_stored_table_would_ask_for_more_operations_so_a_small_one_stays_with_the_kernels_on_a_gpu(counts):
    for case, (ours, stored) in counts["stored"].items():
        print(f"{case}: {sum(ours.values())} against {sum(stored.values())}")
        assert sum(ours.values()) < sum(stored.values()), case


def test_only_the_passes_that_are_needed_run(counts):
    """(passes over rows, passes over columns) of a backward."""
    wanted = {"query": [1, 0], "key": [0, 1], "both": [1, 1], "temperature": [1, 0], "bias": [0, 1]}
    assert counts["needs"] == wanted


class Operations(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations_of(loss):
    """Those of forward and backward on rows that are their own keys."""
    rows = torch.eye(6, 4).requires_grad_()
    with Operations() as mode:
        torch.autograd.grad(loss(rows, rows), rows)
    return mode.found


INDICES, WIDE, COLUMNS = torch.arange(6), torch.tensor(0.1), torch.zeros(6)
LOOKED_AT = {
    "info_nce": (0, lambda a, b: info_nce(a, b)),
    "info_nce(temperature)": (1, lambda a, b: info_nce(a, b, temperature=WIDE)),
    "info_nce(positives)": (1, lambda a, b: info_nce(a, b, positives=INDICES)),
    "info_nce(exclude)": (1, lambda a, b: info_nce(a, b, exclude=INDICES)),
    "nt_xent": (0, lambda a, b: nt_xent(a, b)),
    "nt_xent(temperature)": (1, lambda a, b: nt_xent(a, b, temperature=WIDE)),
    "clip_loss": (0, lambda a, b: clip_loss(a, b, temperature=0.1)),
    "clip_loss(temperature)": (1, lambda a, b: clip_loss(a, b, temperature=WIDE)),
    "similarity_logsumexp(bias, exclude)": (
        2,
        lambda a, b: similarity_logsumexp(a, b, bias=COLUMNS, exclude=INDICES).sum(),
    ),
    "sigma_kl": (0, lambda a, b: sigma_kl(a, b, b, a)),
    "sigma_kl(temperature)": (1, lambda a, b: sigma_kl(a, b, b, a, temperature=WIDE)),
    "soft_cross_entropy(everything)": (
        5,
        lambda a, b: soft_cross_entropy(
            a,
            b,
            b,
            a,
            temperature=WIDE,
            teacher_temperature=WIDE,
            student_bias=COLUMNS,
            teacher_bias=COLUMNS,
            exclude=INDICES,
        ),
    ),
    "gessl_loss": (0, lambda a, b: sum(rows.sum() for rows in gessl_loss(a, b, b, a))),
    "gessl_loss(positives)": (
        1,
        lambda a, b: sum(rows.sum() for rows in gessl_loss(a, b, b, a, positives=INDICES)),
    ),
    "softmax_marginal": (0, lambda a, b: softmax_marginal(a, b).sum()),
    "softmax_marginal(bias)": (1, lambda a, b: softmax_marginal(a, b, bias=COLUMNS).sum()),
    "sinkhorn_potentials": (0, lambda a, b: sinkhorn_potentials(a, b).sum() + 0 * (a.sum() + b.sum())),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_the_values_of_a_users_tensors_are_looked_at_once_and_no_others(name):
    expected, loss = LOOKED_AT[name]
    assert operations_of(loss)["_local_scalar_dense"] == expected


def test_blocks_of_rows_ask_for_no_place_of_an_index():
    """`nonzero` has a length that only the device knows."""
    found = operations_of(lambda a, b: info_nce(a, b, positives=INDICES, exclude=INDICES))
    assert not found["nonzero"] and not found["index_put_"] and found["scatter_add_"] == 2


def test_a_memory_bank_does_not_wait_for_its_position():
    criterion = NTXentLoss(memory_bank_size=(8, 4))
    found = operations_of(criterion)
    assert found["index_copy"] == 1 and not found["_local_scalar_dense"]


class Waits(TorchDispatchMode):
    """Where the host waits for a device: for a number from it, or for a copy to it that does not come from
    pinned memory.
    """

    def __init__(self):
        super().__init__()
        self.found, self.sent, self._pinned = [], 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "is_pinned":
            return any(args[0] is tensor for tensor in self._pinned)
        if name == "_pin_memory":
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if name == "nonzero" and not args[0].is_cuda:
            return torch.zeros(
                3, args[0].dim(), dtype=torch.int64
            )  # its length is data, which fake tensors have not
        if name in ("_local_scalar_dense", "nonzero") and args[0].is_cuda:
            self.found.append(name)
        if name in ("_to_copy", "copy_"):
            source, target = (
                (args[1], args[0].device)
                if name == "copy_"
                else (args[0], kwargs.get("device", args[0].device))
            )
            if torch.device(target).type == "cuda" and not source.is_cuda:
                self.sent += 1
                if not (kwargs.get("non_blocking") and any(source is tensor for tensor in self._pinned)):
                    self.found.append(name)
        return function(*args, **kwargs)


@pytest.fixture
def waits():
    """Fake tensors of the device "cuda", and what the host waits for meanwhile."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as mode:
        yield mode


CUDA = torch.device("cuda", 0)


def test_the_count_sees_a_copy_from_pageable_memory(waits):
    torch.tensor([3], device=CUDA)
    torch.zeros(3).to(CUDA, non_blocking=True)
    assert waits.found == ["_to_copy"] * 2


def test_what_is_sent_goes_through_pinned_memory(waits):
    assert to_device(torch.zeros(3), CUDA).device == CUDA
    assert waits.sent == 1 and not waits.found


def test_a_gather_does_not_wait_for_the_number_of_rows(waits, monkeypatch):
    gathered = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(
        dist,
        "all_gather_into_tensor",
        lambda out, rows, group: gathered.append((rows.dtype, tuple(rows.shape))),
    )
    rows = all_gather_rows(torch.empty(4, 3, device=CUDA), "a group")
    assert (
        rows.shape == (8, 3)
        and gathered == [(torch.int64, (1,)), (torch.float32, (4, 3))]
        and not waits.found
    )


class OneBatch:
    """An engine of one batch whose views are made already."""

    def views(self, requests):
        request = next(requests)
        yield Made([torch.empty(len(request.index), 3, 2, 2)], request.index)

    def close(self):
        pass


def test_a_loader_waits_for_neither_index_nor_label(waits):
    images = ArrayImages(np.zeros((6, 4, 4, 3), dtype=np.uint8), np.arange(6))
    bad_files = BadFiles(images, skip=False, training=False, listing=None)
    setup = Setup(images, Draws((), 0), bad_files, batch_size=6, device=CUDA, workers=1)
    loader = Loader("none", OneBatch(), setup, Sampling(6, 6, 0, 0, 1, False))
    (batch,) = loader
    assert batch.index.device == batch.label.device == CUDA and waits.sent == 2 and not waits.found
