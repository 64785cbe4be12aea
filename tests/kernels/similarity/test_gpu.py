"""The Triton kernels on a GPU: their error against float64 beside that of dense PyTorch in the same dtype
(`make gpu`).
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fastgessl.kernels import (
    clip_loss,
    gessl_loss,
    implementation_for,
    info_nce,
    nt_xent,
    sinkhorn_potentials,
    soft_cross_entropy,
    softmax_marginal,
)

gpu = pytest.mark.gpu

SHAPES = [(64, 64, 64), (300, 517, 96), (1000, 1000, 128), (513, 700, 256), (200, 333, 768), (130, 257, 2048)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [0.01, 0.1, 0.5]
FLOORS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 1e-3}
"""In norm; float32 at a temperature of 0.01 has ten times as much."""


def operands(M, N, D, dtype, temperature):
    generator = torch.Generator("cuda").manual_seed(M + D)

    def unit(rows):
        return normalize(torch.randn(rows, D, generator=generator, device="cuda", dtype=torch.float64), dim=1)

    key, teacher_key = unit(N), unit(N)
    noise = 1.5 if temperature > 0.05 else 4.0
    query, teacher_query = (normalize(keys[:M] + noise * unit(M), dim=1) for keys in (key, teacher_key))
    return [part.to(dtype) for part in (query, key, teacher_query, teacher_key)]


LOSSES = {
    "info_nce": lambda q, k, tq, tk, s: info_nce(
        q, k, exclude=(torch.arange(len(q), device=q.device) + 3) % len(k), **s
    ),
    "nt_xent": lambda q, k, tq, tk, s: nt_xent(q, k[: len(q)], **s),
    "clip": lambda q, k, tq, tk, s: clip_loss(q, k[: len(q)], **s),
    "cross_entropy": lambda q, k, tq, tk, s: soft_cross_entropy(q, k, tq, tk, teacher_temperature=0.3, **s),
    "gessl": lambda q, k, tq, tk, s: sum(part.mean() for part in gessl_loss(q, k, tq, tk, **s)),
}
# Every pair of loss, shape, dtype and temperature: 223 kernels to compile, a second or two each, where the
# full product of 270 has 621.
CASES = [
    (name, shape, DTYPES[(i + j) % 3], TEMPERATURES[(2 * i + j + j // 3) % 3])
    for i, name in enumerate(LOSSES)
    for j, shape in enumerate(SHAPES)
]


def derivatives(loss, parts, temperature, implementation):
    """Loss, gradients, and the gradient of ⟨student's gradients, a direction⟩."""
    leaves = [part.clone().requires_grad_() for part in parts]
    value = loss(*leaves, {"temperature": temperature, "implementation": implementation})
    first = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    along = sum((grad * part.detach().flip(0)).sum() for grad, part in zip(first[:2], parts[:2], strict=True))
    return value, *first, *torch.autograd.grad(along * temperature, leaves, materialize_grads=True)


@gpu
@pytest.mark.parametrize(("name", "shape", "dtype", "temperature"), CASES, ids=str)
def test_error_is_within_its_floor_beyond_twice_that_of_dense_pytorch(
    name, shape, dtype, temperature, record_property
):
    parts = operands(*shape, dtype, temperature)
    exact = derivatives(LOSSES[name], [part.double() for part in parts], temperature, "reference")
    ours = derivatives(LOSSES[name], parts, temperature, "triton")
    # Dense PyTorch in this dtype: the same definition, its products and its gradients rounded to the dtype as
    # autocast would.
    with torch.autocast("cuda", enabled=False):
        dense = derivatives(LOSSES[name], parts, temperature, "reference")
    sizes = [max(expected.norm().item(), 1e-6) for expected in exact]
    errors, of_dense = (
        [
            (part.double() - expected).norm().item() / size
            for part, expected, size in zip(found, exact, sizes, strict=True)
        ]
        for found in (ours, dense)
    )
    floor = FLOORS[dtype] * (10 if dtype == torch.float32 and temperature == 0.01 else 1)
    # How near the worst comes to a bound with a fifth of the floor.
    tightness = max(error / (2 * peer + floor / 5) for error, peer in zip(errors, of_dense, strict=True))
    record_property("share_of_tight_bound", tightness)
    print(f"share of the bound with a fifth of the floor: {tightness:.2f}; errors {errors}, dense {of_dense}")
    assert all(
        math.isfinite(error) and error <= 2 * peer + floor
        for error, peer in zip(errors, of_dense, strict=True)
    )


@gpu
def test_a_gpu_tensor_takes_triton_by_itself_and_float64_does_not():
    assert implementation_for(torch.empty(2, 2, device="cuda"))[0] == "triton"
    assert implementation_for(torch.empty(2, 2, device="cuda", dtype=torch.float64))[0] == "chunked"


@gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_of_nan_or_infinity_gives_nan_and_no_assertion_that_would_end_the_process(value):
    query, prototypes = operands(64, 64, 128, torch.float32, 0.1)[:2]
    query[1, 0] = value
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rows = query.bfloat16().requires_grad_()
        potentials = sinkhorn_potentials(rows, prototypes)
        loss = soft_cross_entropy(rows, prototypes, rows.detach(), prototypes, teacher_bias=potentials)
        mean = softmax_marginal(rows, prototypes)
    gradient = torch.autograd.grad(loss + (mean * mean.log()).sum(), rows)[0]
    assert potentials.isnan().all() and loss.isnan() and gradient.isnan().any()
    assert info_nce(prototypes, prototypes).isfinite()  # the device still answers


@gpu
def test_results_repeat_bit_for_bit():
    parts = operands(1000, 1000, 128, torch.bfloat16, 0.1)
    runs = [derivatives(LOSSES["gessl"], parts, 0.1, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@gpu
def test_a_step_is_captured_in_one_cuda_graph():
    query, key = (part.requires_grad_() for part in operands(256, 256, 128, torch.bfloat16, 0.1)[:2])

    def step():
        return torch.autograd.grad(info_nce(query, key), (query, key))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [step() for _ in range(3)][-1]
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@gpu
def test_a_million_keys_need_no_table():
    query = normalize(torch.randn(4096, 128, device="cuda"), dim=1).bfloat16().requires_grad_()
    key = normalize(torch.randn(1 << 20, 128, device="cuda"), dim=1).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(query, key).backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 28


@gpu
def test_grad_scaler_and_autocast_train_in_float16():
    layer = torch.nn.Linear(32, 64).cuda()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    images = torch.randn(2, 128, 32, device="cuda")
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nt_xent(layer(images[0]), layer(images[0] + 0.1 * images[1]), temperature=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(parameter.isfinite().all() for parameter in layer.parameters())
