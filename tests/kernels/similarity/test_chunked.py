"""The row-chunked implementation against the dense definitions, in float64: values, first and second
derivatives, memory.
"""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgessl.kernels import (
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    reference,
    sigma_kl,
    soft_cross_entropy,
)
from fastgessl.kernels.similarity import chunked, similarity_statistics
from fastgessl.kernels.similarity.problem import Side

M, N = 5, 7
POSITIVES = torch.tensor([1, 2, -1, 4, 5])
EXCLUDE = torch.tensor([[0, 1], [3, -1], [-1, -1], [2, 2], [6, 4]])
CASES = list(itertools.product((False, True), (None, "kl", "cross-entropy"), (False, True), (False, True)))
NAMES = [f"{'positives-' * a}{b or 'alone'}{'-exclude' * c}{'-bias' * d}" for a, b, c, d in CASES]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=CASES, ids=NAMES)
def problem(request):
    """(leaves, chunked function of them, dense function of them) -> the statistics that the case has."""
    has_positives, teacher, has_exclude, has_bias = request.param
    torch.manual_seed(0)
    positives, exclude = POSITIVES if has_positives else None, EXCLUDE if has_exclude else None
    leaves = [draw(M, 3), draw(N, 3), scalar(1.3)] + [draw(N)] * has_bias
    if teacher:
        leaves += [draw(M, 4), draw(N, 4), scalar(0.7)] + [draw(N)] * has_bias
    width = 4 if has_bias else 3

    def sides(parts):
        padded = [tuple(parts[i : i + width]) + (None,) * (4 - width) for i in range(0, len(parts), width)]
        return [Side(*part) for part in padded] + [None] * (2 - len(padded))

    def streaming(*parts):
        outputs = similarity_statistics(*sides(parts), positives, exclude, teacher == "kl", "chunked")
        return tuple(output for output in outputs if len(output))

    def dense(*parts):
        student, other = sides(parts)
        lse = reference.similarity_logsumexp(
            student.query, student.key, 1 / student.scale, student.bias, exclude
        )
        found = [lse]
        if has_positives:
            table = reference.logits(student.query, student.key, 1 / student.scale, student.bias)
            found.append(
                table.gather(1, POSITIVES.clamp(min=0)[:, None])[:, 0].masked_fill(POSITIVES < 0, 0.0)
            )
        if teacher:
            divergence = reference.sigma_kl if teacher == "kl" else reference.soft_cross_entropy
            operands = (
                student.query,
                student.key,
                other.query,
                other.key,
                1 / student.scale,
                1 / other.scale,
            )
            found.append(divergence(*operands, student.bias, other.bias, exclude) - lse)
        return tuple(found)

    return leaves, streaming, dense


def derivatives(function, leaves):
    """The outputs, the gradient of all of them under random weights, and a product with their Hessian."""
    generator = torch.Generator().manual_seed(1)

    def weighted(parts):
        return sum(
            (part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in parts
        )

    outputs = function(*leaves)
    first = torch.autograd.grad(weighted(outputs), leaves, create_graph=True)
    return outputs, first, torch.autograd.grad(weighted(first), leaves)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_statistics_and_derivatives_equal_dense_float64(problem):
    leaves, streaming, dense = problem
    close(derivatives(streaming, leaves), derivatives(dense, leaves))


@pytest.mark.parametrize("device, logits", [("cpu", 1 << 18), ("cuda", 1 << 24)])
def test_a_block_has_as_many_rows_as_its_logits_allow_on_the_device_and_at_least_128(device, logits):
    for columns in (1, 96, 1024, 1 << 14, 1 << 17, 1 << 20):
        rows = chunked.rows_of_block(columns, torch.device(device))
        assert rows == 128 if columns > logits // 128 else rows * columns <= logits < (rows + 1) * columns


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_result_does_not_depend_on_the_block(problem, rows, monkeypatch):
    leaves, streaming, _ = problem
    expected = derivatives(streaming, leaves)
    monkeypatch.setattr(chunked, "BLOCK_ROWS", rows)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)
    close(derivatives(streaming, leaves), expected)


class Held(TorchDispatchMode):
    """The largest number of blocks of so many bytes that are alive at once."""

    def __init__(self, block):
        super().__init__()
        self.block, self.alive, self.most = block, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.block and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.most = max(self.most, round(sum(self.alive.values()) / self.block))
        return output


@pytest.mark.parametrize(
    "loss, sides, held",
    [
        (info_nce, 2, [2, 5, 7]),
        (lambda *sides: sum(part.mean() for part in gessl_loss(*sides)), 4, [4, 13, 17]),
        (nt_xent, 2, [2, 4, 7]),
    ],
    ids=["info_nce", "with a teacher that moves", "nt_xent"],
)
def test_no_more_blocks_are_held_at_once_than_the_bound_on_memory_says(loss, sides, held, monkeypatch):
    rows, columns = 16, 1024
    monkeypatch.setattr(chunked, "BLOCK_ROWS", rows)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", rows * columns)
    torch.manual_seed(0)
    count = columns // 2 if loss is nt_xent else columns
    leaves = [draw(count, 4) for _ in range(sides)]
    with Held(rows * columns * 8) as forward:
        value = loss(*leaves)
    with Held(rows * columns * 8) as backward:
        first = torch.autograd.grad(value, leaves, create_graph=True)
    along = sum(gradient.square().sum() for gradient in first)
    with Held(rows * columns * 8) as second:
        torch.autograd.grad(along, leaves)
    assert [mode.most for mode in (forward, backward, second)] == held


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
def test_error_in_narrow_dtypes_stays_within_the_budget(dtype, tolerance, temperature):
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(4, 60, 32, dtype=torch.float64), dim=2)
    noise = (
        4.0 if temperature == 0.01 else 1.0
    )  # so that the positive is not certain, and gradients are not all rounding
    table[1] = torch.nn.functional.normalize(table[0] + noise * table[1], dim=1)
    tolerance = 2e-5 if dtype == torch.float32 and temperature == 0.01 else tolerance

    def derivatives(operands, implementation):
        leaves = [part.clone().requires_grad_() for part in operands]
        contrastive, sigma = gessl_loss(*leaves, temperature=temperature, implementation=implementation)
        grads = torch.autograd.grad((contrastive + sigma).mean(), leaves, create_graph=True)
        along = sum((grad * part).sum() for grad, part in zip(grads, operands.flip(0), strict=True))
        return (contrastive, sigma, *grads, *torch.autograd.grad(along * temperature, leaves))

    narrow = table.to(dtype)
    for found, expected in zip(
        derivatives(narrow, "chunked"), derivatives(narrow.double(), "reference"), strict=True
    ):
        assert found.isfinite().all()
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


SATURATED = {
    "info_nce": lambda q, k, how: info_nce(q, k, temperature=0.01, reduction="none", implementation=how),
    "sigma_kl": lambda q, k, how: sigma_kl(
        q, k, k.detach(), q.detach(), temperature=0.01, reduction="none", implementation=how
    ),
    "soft_cross_entropy": lambda q, k, how: soft_cross_entropy(
        q, k, q.detach(), k.detach(), teacher_temperature=0.01, reduction="none", implementation=how
    ),
    "clip_loss": lambda q, k, how: clip_loss(q, k, temperature=0.01, reduction="none", implementation=how),
}


@pytest.mark.parametrize("name", SATURATED)
def test_where_the_positive_is_nearly_certain_derivatives_are_as_exact_as_those_of_a_stored_table(name):
    """P inherits the rounding of an lse of 100, 4e-6 in float32, unless it is corrected: 3.7e-5 in second
    derivatives.
    """
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, 256, 64, dtype=torch.float64), dim=2)
    operands = [torch.nn.functional.normalize(unit[0] + 1.5 * unit[1], dim=1).float(), unit[0].float()]
    direction, weights = torch.randn(2, 256, 64, dtype=torch.float64), torch.rand(256, dtype=torch.float64)

    def derivatives(dtype, how):
        leaves = [operand.to(dtype).requires_grad_() for operand in operands]
        rows = SATURATED[name](*leaves, how)
        first = torch.autograd.grad((rows * weights.to(dtype)).sum(), leaves, create_graph=True)
        along = sum(
            (gradient * part.to(dtype)).sum() for gradient, part in zip(first, direction, strict=True)
        )
        return (*first, *torch.autograd.grad(along * 0.01, leaves))

    exact = derivatives(torch.float64, "reference")
    for ours, dense, expected in zip(
        derivatives(torch.float32, "chunked"), derivatives(torch.float32, "reference"), exact, strict=True
    ):
        assert (ours.double() - expected).norm() <= 2 * (dense.double() - expected).norm()


def test_both_softmaxes_sum_to_one_far_beyond_the_rounding_of_their_lse():
    """An lse near 100 is rounded to 4e-6: the sums, which are derivatives along a bias that moves all columns
    alike, are not.
    """
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(
        torch.randn(64, 4), dim=1
    )  # neighbours near enough for sums between 1 and 2
    student, teacher = (Side(unit, unit, torch.tensor(scale), torch.zeros(64)) for scale in (97.0, 93.0))

    def statistics(bias):
        lse, _, cross_term = similarity_statistics(
            student._replace(bias=bias), teacher, None, None, False, "chunked"
        )
        return lse, cross_term

    assert (statistics(student.bias)[0] - 97).abs().max() < 2
    for rows, expected in zip(torch.func.jacrev(statistics)(student.bias), (1, -1), strict=True):
        assert (rows.double().sum(1) - expected).abs().max() < 5e-7
