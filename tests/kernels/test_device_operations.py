"""What a step asks of a GPU, counted without one: operations, looks at values, and copies for which the host
waits.

Fake tensors run every line and compute nothing. On the CPU they say that they are CUDA's, because autograd
asks the driver about a true CUDA device; where no backward runs, the device is "cuda" itself.
"""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastgessl.kernels import (
    NTXentLoss,
    ViewParameters,
    clip_loss,
    gessl_loss,
    implementation_for,
    info_nce,
    nt_xent,
    prototypes,
    sigma_kl,
    similarity_logsumexp,
    sinkhorn_potentials,
    soft_cross_entropy,
    softmax_marginal,
)
from fastgessl.kernels import backend as dispatching
from fastgessl.kernels.collectives import all_gather_rows
from fastgessl.kernels.similarity import autograd as similarity
from fastgessl.kernels.similarity import launch as similarity_launch
from fastgessl.kernels.similarity import symmetric
from fastgessl.kernels.transfer import to_device
from fastgessl.kernels.views import triton as views_triton
from fastgessl.pipelines.bad_files import BadFiles
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engines.protocol import Shown
from fastgessl.pipelines.engines.resident import ResidentEngine
from fastgessl.pipelines.loader import Loader
from fastgessl.pipelines.sampler import Sampling
from fastgessl.pipelines.sources.images import ArrayImages
from fastgessl.pipelines.specs import ViewSpec

ROWS, FEATURES, TEMPERATURE = 256, 128, 0.1
FREE = (
    "empty",
    "empty_like",
    "new_empty",
    "detach",
    "alias",
    "_unsafe_view",
    "lift_fresh",
    "scalar_tensor",
    "device",
    "item",
)


class Operations(TorchDispatchMode):
    """Names of what would be launched: no views, no allocations, nothing without elements."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, (tuple, list)) else output
        name = function.overloadpacket.__name__
        if not function.is_view and name not in FREE and (first is None or first.numel()):
            self.found[name] += 1
        return output


@pytest.fixture
def operations(monkeypatch):
    """A function that counts the operations of its argument, called on fake tensors that take the Triton
    kernels.
    """
    counting = Operations()

    def launched(kernel):
        counting.found[kernel.__name__] += 1

    class Launcher:
        """Stands for a kernel that is launched directly."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **settings: launched(self.kernel)

    merge = similarity_launch.first_order.merge_strips_kernel
    monkeypatch.setattr(similarity_launch.first_order, "merge_strips_kernel", Launcher(merge))
    monkeypatch.setattr(similarity_launch, "_launch", lambda kernel, *rest: launched(kernel))
    monkeypatch.setattr(dispatching, "_device_obstacle", lambda index: None)
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda tensor: True))
    for module in (similarity, symmetric, prototypes):
        monkeypatch.setattr(module, "plain", lambda inputs: True)

    def count(step):
        counting.found.clear()
        with FakeTensorMode(), counting:
            step()
        return Counter(counting.found)

    return count


def unit(rows=ROWS, dtype=torch.bfloat16, moving=True):
    return torch.empty(rows, FEATURES, dtype=dtype, requires_grad=moving)


def dense_info_nce(query, key):
    """The three lines that people write."""
    return cross_entropy(query @ key.T / TEMPERATURE, torch.arange(len(query), device=query.device))


def dense_nt_xent(first, second):
    rows = normalize(torch.cat([first, second]), dim=1)
    index = torch.arange(len(rows), device=rows.device)
    table = (rows @ rows.T / TEMPERATURE).masked_fill(index[:, None] == index, -torch.inf)
    return cross_entropy(table, index.roll(len(first)))


def dense_clip(image, text):
    table, index = image @ text.T / TEMPERATURE, torch.arange(len(image), device=image.device)
    return (cross_entropy(table, index) + cross_entropy(table.T, index)) / 2


PAIRS = {
    "info_nce": (info_nce, dense_info_nce),
    "nt_xent": (nt_xent, dense_nt_xent),
    "clip": (clip_loss, dense_clip),
}


def derivative(loss, dtype, order):
    """Forward and backward of a loss of two operands, and at the second order a product with its Hessian."""

    def step():
        leaves = unit(dtype=dtype), unit(dtype=dtype)
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad((first[0] * first[1]).sum(), leaves)

    return step


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_step_asks_for_at_most_one_operation_more_than_three_lines_of_pytorch(
    name, dtype, order, operations
):
    ours, dense = PAIRS[name]
    found = operations(derivative(lambda a, b: ours(a, b, temperature=TEMPERATURE), dtype, order))
    peer = operations(derivative(dense, dtype, order))
    print(f"{name} {dtype} order {order}: {found.total()} against {peer.total()}")
    assert any(operation.endswith("_kernel") for operation in found) and not any(
        "_kernel" in operation for operation in peer
    )
    assert found.total() <= peer.total() + 1


WITH_TEACHER = {
    "sigma_kl": (lambda *x, **how: sigma_kl(*x, temperature=TEMPERATURE, **how)),
    "soft_cross_entropy": (lambda *x, **how: soft_cross_entropy(*x, temperature=TEMPERATURE, **how)),
    "gessl_loss": (
        lambda *x, **how: sum(rows.mean() for rows in gessl_loss(*x, temperature=TEMPERATURE, **how))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*WITH_TEACHER, *(name for name in PAIRS if name != "nt_xent")])
def test_a_stored_table_would_ask_for_more_operations_so_a_small_one_stays_with_the_kernels(
    name, dtype, operations
):
    """The ground on which `implementation_for` stores nothing on a GPU."""

    def loss(implementation):
        if name in PAIRS:
            return lambda a, b: PAIRS[name][0](a, b, temperature=TEMPERATURE, implementation=implementation)
        return lambda a, b: WITH_TEACHER[name](a, b, a.detach(), b.detach(), implementation=implementation)

    ours, stored = (operations(derivative(loss(how), dtype, 1)).total() for how in (None, "reference"))
    print(f"{name} {dtype}: {ours} against {stored}")
    assert ours < stored
    with FakeTensorMode():
        assert implementation_for(unit(2), entries=4)[0] == "triton"


def test_only_what_is_needed_is_computed(operations):
    def needing(query, key, temperature):
        def step():
            operands = unit(moving=query), unit(moving=key)
            scale = torch.empty((), requires_grad=True) if temperature else 0.1
            loss = info_nce(*operands, temperature=scale)
            leaves = [
                part for part in (*operands, scale) if isinstance(part, torch.Tensor) and part.requires_grad
            ]
            torch.autograd.grad(loss, leaves)

        return operations(step)

    def kernels(found):
        return found["gradient_rows_kernel"], found["gradient_columns_kernel"], found["sum"]

    assert kernels(needing(True, False, False)) == (1, 0, 0)
    assert kernels(needing(False, True, False)) == (0, 1, 0)
    assert kernels(needing(True, True, False)) == (1, 1, 0)
    assert kernels(needing(False, False, True)) == (1, 0, 1)

    def of_bias():
        bias = torch.empty(ROWS, requires_grad=True)
        torch.autograd.grad(
            similarity_logsumexp(unit(moving=False), unit(moving=False), bias=bias).sum(), bias
        )

    assert kernels(operations(of_bias))[:2] == (0, 1)


def indices():
    return torch.empty(ROWS, dtype=torch.int64)


def wide():
    return torch.empty(())


def columns():
    return torch.empty(ROWS)


LOOKED_AT = {
    "info_nce": (0, lambda a, b: info_nce(a, b)),
    "info_nce(temperature)": (1, lambda a, b: info_nce(a, b, temperature=wide())),
    "info_nce(positives)": (1, lambda a, b: info_nce(a, b, positives=indices())),
    "info_nce(exclude)": (1, lambda a, b: info_nce(a, b, exclude=indices())),
    "nt_xent": (0, lambda a, b: nt_xent(a, b)),
    "nt_xent(temperature)": (1, lambda a, b: nt_xent(a, b, temperature=wide())),
    "clip_loss": (0, lambda a, b: clip_loss(a, b, temperature=0.1)),
    "clip_loss(temperature)": (1, lambda a, b: clip_loss(a, b, temperature=wide())),
    "similarity_logsumexp(bias, exclude)": (
        2,
        lambda a, b: similarity_logsumexp(a, b, bias=columns(), exclude=indices()).sum(),
    ),
    "sigma_kl": (0, lambda a, b: sigma_kl(a, b, b, a)),
    "sigma_kl(temperature)": (1, lambda a, b: sigma_kl(a, b, b, a, temperature=wide())),
    "soft_cross_entropy(everything)": (
        5,
        lambda a, b: soft_cross_entropy(
            a,
            b,
            b,
            a,
            temperature=wide(),
            teacher_temperature=wide(),
            student_bias=columns(),
            teacher_bias=columns(),
            exclude=indices(),
        ),
    ),
    "gessl_loss": (0, lambda a, b: sum(rows.sum() for rows in gessl_loss(a, b, b, a))),
    "gessl_loss(positives)": (
        1,
        lambda a, b: sum(rows.sum() for rows in gessl_loss(a, b, b, a, positives=indices())),
    ),
    "softmax_marginal": (0, lambda a, b: softmax_marginal(a, b).sum()),
    "softmax_marginal(bias)": (1, lambda a, b: softmax_marginal(a, b, bias=columns()).sum()),
    "sinkhorn_potentials": (0, lambda a, b: sinkhorn_potentials(a, b).sum() + 0 * (a.sum() + b.sum())),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_the_values_of_a_users_tensors_are_looked_at_once_and_no_others(name, operations):
    expected, loss = LOOKED_AT[name]
    found = operations(derivative(loss, torch.bfloat16, 1))
    assert found["_assert_async"] == expected and not found["_local_scalar_dense"]


def test_a_rows_index_that_the_library_made_needs_no_mask(operations):
    for step in (info_nce, nt_xent):
        found = operations(lambda step=step: step(unit(), unit()))
        assert not found["masked_fill"] and not found["lt"]
    assert operations(lambda: info_nce(unit(), unit(), positives=indices()))["masked_fill"] == 1


def test_blocks_of_rows_ask_for_no_place_of_an_index(operations):
    """`nonzero` has a length that only the device knows."""

    def step():
        rows = unit(dtype=torch.float64)
        loss = info_nce(rows, rows, positives=indices(), exclude=indices(), implementation="chunked")
        torch.autograd.grad(loss, rows)

    found = operations(step)
    assert not found["nonzero"] and not found["index_put_"] and found["scatter_add_"] == 2


def test_a_memory_bank_does_not_wait_for_its_position(operations):
    """Fake tensors refuse to be made a number, too."""
    criterion = []

    def step():
        criterion.append(NTXentLoss(memory_bank_size=(8, 4)))
        criterion[0].enqueue(torch.empty(6, 4))

    found = operations(step)
    assert found["index_copy"] == 1 and not found["_local_scalar_dense"] and criterion[0].bank.shape == (8, 4)


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


@pytest.fixture
def view_kernels(monkeypatch):
    """Kernels of views that do nothing; what is kept of their constants is forgotten before and after."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *arguments, **settings: None

    for name in ("whole_view_kernel", "crop_kernel", "colour_kernel", "blur_kernel"):
        monkeypatch.setattr(views_triton, name, Nothing())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    views_triton.colour_constants.cache_clear()
    yield
    views_triton.colour_constants.cache_clear()


@pytest.mark.parametrize("size", [16, 96])
def test_views_send_their_colours_once_and_wait_for_nothing_else(size, waits, view_kernels):
    images, drawn = (
        torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device=CUDA),
        ViewParameters.unchanged(4, 32, 32),
    )
    settings = {
        "size": size,
        "interpolation": "bilinear",
        "blur_kernel": 3,
        "solarize_threshold": 128.0,
        "resize": True,
    }
    colours = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}
    for sent, copies in ((1, 3), (1, 5), (2, 8)):
        if sent == 2:
            colours["std"] = [0.3, 0.3, 0.3]
        views_triton.augment(images, drawn, **settings, **colours)
        assert (
            waits.found == ["_to_copy"] * sent and waits.sent == copies
        )  # parameters and places of blurred samples each time


def test_colours_that_are_kept_are_those_of_their_mean_and_deviation():
    found = views_triton.colour_constants((0.1, 0.2, 0.3), (0.5, 0.25, 0.2), torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.3, 2.0, 4.0, 5.0]))
    assert views_triton.colour_constants((0.1, 0.2, 0.3), (0.5, 0.25, 0.2), torch.device("cpu")) is found
    views_triton.colour_constants.cache_clear()


class OneBatch:
    """An engine of one batch whose views are made already."""

    def views(self, requests):
        request = next(requests)
        yield Shown([torch.empty(len(request.index), 3, 2, 2)], request.index)

    def close(self):
        pass


def test_a_loader_waits_for_neither_index_nor_label(waits):
    images = ArrayImages(np.zeros((6, 4, 4, 3), dtype=np.uint8), np.arange(6))
    loader = Loader(
        images,
        OneBatch(),
        Sampling(6, 6, 0, 0, 1, False),
        BadFiles(images, skip=False, training=False, listing=None),
        CUDA,
        "none",
    )
    (batch,) = loader
    assert batch.index.device == batch.label.device == CUDA and waits.sent == 2 and not waits.found


def test_the_resident_engine_does_not_wait_for_its_gather(waits):
    images = ArrayImages(np.zeros((6, 4, 4, 3), dtype=np.uint8))
    spec = ViewSpec(size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    engine = ResidentEngine(images, Draws((spec,), 0), CUDA)
    waits.found.clear()  # of the whole data set, once
    assert engine._gather(np.array([3, 1])).shape == (2, 4, 4, 3)
    assert waits.sent == 2 and not waits.found
