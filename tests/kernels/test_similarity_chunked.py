"""The row-chunked implementation against the dense definitions, in float64: values, first and second derivatives, memory."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastgessl.kernels import gessl_loss, nt_xent, reference, similarity_chunked
from fastgessl.kernels.similarity import similarity_statistics
from fastgessl.kernels.similarity_chunked import Side

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
        lse = reference.similarity_logsumexp(student.query, student.key, 1 / student.scale, student.bias, exclude)
        found = [lse]
        if has_positives:
            table = reference.logits(student.query, student.key, 1 / student.scale, student.bias)
            found.append(table.gather(1, POSITIVES.clamp(min=0)[:, None])[:, 0].masked_fill(POSITIVES < 0, 0.0))
        if teacher:
            divergence = reference.sigma_kl if teacher == "kl" else reference.soft_cross_entropy
            operands = (student.query, student.key, other.query, other.key, 1 / student.scale, 1 / other.scale)
            found.append(divergence(*operands, student.bias, other.bias, exclude) - lse)
        return tuple(found)

    return leaves, streaming, dense


def weighted(function, leaves, seed=1):
    """A scalar in which every output row has its own random weight."""
    generator = torch.Generator().manual_seed(seed)
    outputs = function(*leaves)
    return sum((output * torch.randn(len(output), generator=generator, dtype=output.dtype)).sum() for output in outputs)


def gradients_of(function, leaves):
    return torch.autograd.grad(weighted(function, leaves), leaves, create_graph=True)


def hessian_vector_product(function, leaves):
    generator = torch.Generator().manual_seed(2)
    grads = gradients_of(function, leaves)
    along = sum((grad * torch.randn(grad.shape, generator=generator, dtype=grad.dtype)).sum() for grad in grads)
    return torch.autograd.grad(along, leaves)


def close(found, expected, atol=1e-13):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=atol)


def test_statistics_and_derivatives_equal_dense_float64(problem):
    leaves, streaming, dense = problem
    close(streaming(*leaves), dense(*leaves))
    close(gradients_of(streaming, leaves), gradients_of(dense, leaves))
    close(hessian_vector_product(streaming, leaves), hessian_vector_product(dense, leaves))


def test_first_and_second_derivatives_pass_finite_differences(problem):
    leaves, streaming, _ = problem
    assert gradcheck(streaming, leaves)
    assert gradgradcheck(streaming, leaves)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_result_does_not_depend_on_the_block(problem, rows, monkeypatch):
    leaves, streaming, _ = problem
    expected = streaming(*leaves), hessian_vector_product(streaming, leaves)
    monkeypatch.setattr(similarity_chunked, "BLOCK_ROWS", rows)
    monkeypatch.setattr(similarity_chunked, "BLOCK_ELEMENTS", 1)
    close(streaming(*leaves), expected[0])
    close(hessian_vector_product(streaming, leaves), expected[1])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return output


def test_no_tensor_is_larger_than_a_block_of_rows_at_either_order():
    torch.manual_seed(0)
    rows, features = 2048, 8
    first, second = torch.randn(2, rows, features, requires_grad=True)
    with LargestTensor() as mode:
        grads = torch.autograd.grad(nt_xent(first, second), (first, second), create_graph=True)
        (grads[0].square().sum() + grads[1].square().sum()).backward()
    assert mode.largest <= similarity_chunked.BLOCK_ROWS * 2 * rows < (2 * rows) ** 2 / 8


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
def test_error_in_narrow_dtypes_stays_within_the_budget(dtype, tolerance, temperature):
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(4, 60, 32, dtype=torch.float64), dim=2)
    noise = 4.0 if temperature == 0.01 else 1.0  # so that the positive is not certain, and gradients are not all rounding
    table[1] = torch.nn.functional.normalize(table[0] + noise * table[1], dim=1)
    tolerance = 1e-4 if dtype == torch.float32 and temperature == 0.01 else tolerance

    def derivatives(operands, implementation):
        leaves = [part.clone().requires_grad_() for part in operands]
        contrastive, sigma = gessl_loss(*leaves, temperature=temperature, implementation=implementation)
        grads = torch.autograd.grad((contrastive + sigma).mean(), leaves, create_graph=True)
        along = sum((grad * part).sum() for grad, part in zip(grads, operands.flip(0), strict=True))
        return (contrastive, sigma, *grads, *torch.autograd.grad(along * temperature, leaves))

    narrow = table.to(dtype)
    for found, expected in zip(derivatives(narrow, "chunked"), derivatives(narrow.double(), "reference"), strict=True):
        assert found.isfinite().all()
        assert (found.double() - expected).norm() <= tolerance * expected.norm()
