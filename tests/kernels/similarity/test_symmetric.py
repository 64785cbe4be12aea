"""Symmetric InfoNCE from one table, in one block and several, against dense cross-entropies in float64."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad
from torch.library import opcheck
from torch.nn.functional import cross_entropy

from fastgessl.kernels import clip_loss, info_nce
from fastgessl.kernels.similarity import chunked, symmetric

N, D = 7, 4


def dense(image, text, temperature):
    logits, pairs = image @ text.T / temperature, torch.arange(len(image))
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def streaming(image, text, temperature):
    return clip_loss(image, text, temperature=temperature)


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return *torch.randn(2, N, D, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)


@pytest.fixture(params=[128, 3], ids=["one-block", "many-blocks"], autouse=True)
def rows_of_a_block(request, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_first_and_second_derivatives_pass_finite_differences(operands):
    leaves = [operand.clone().requires_grad_() for operand in operands]
    assert gradcheck(streaming, leaves)
    assert gradgradcheck(streaming, leaves)


@pytest.mark.parametrize(
    "needs",
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
    ids=["all", "image", "text", "temperature"],
)
def test_value_and_gradients_at_both_orders_equal_dense(operands, needs):
    def derivatives(loss):
        operands_ = [
            operand.clone().requires_grad_(need) for operand, need in zip(operands, needs, strict=True)
        ]
        leaves = [leaf for leaf in operands_ if leaf.requires_grad]
        value = loss(*operands_)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        along = sum(gradient.square().sum() for gradient in first)
        return value, first, torch.autograd.grad(along, leaves)

    close(derivatives(streaming), derivatives(dense))


def test_operators_pass_opcheck_and_compile(operands):
    image, text, temperature = (operand.clone().requires_grad_() for operand in operands)
    saved = symmetric.statistics(image, text, temperature, "chunked")[3].detach()
    weights = torch.randn(3, N, dtype=torch.float64).unbind()
    opcheck(symmetric.statistics, (image, text, temperature, "chunked"))
    opcheck(symmetric.gradients, (*weights, image, text, temperature, saved, "chunked", [True, False, True]))
    compiled = torch.compile(streaming, fullgraph=True, backend="aot_eager")
    close(
        torch.autograd.grad(compiled(image, text, temperature), (image, text)), grad(dense, (0, 1))(*operands)
    )


def test_far_apart_columns_do_not_overflow():
    image = torch.tensor(
        [[60.0], [1.0], [-60.0], [1.0], [2.0], [-1.0], [0.5]]
    )  # the last blocks are far below the first
    found = symmetric.chunked_statistics(image, image, torch.tensor(1.0))
    table = image @ image.T
    torch.testing.assert_close(found[:3], (table.logsumexp(1), table.logsumexp(0), table.diagonal()))


@pytest.mark.parametrize(
    "exclude",
    [
        None,
        torch.tensor([0, 1, 2, -1, 4, 0, 6]),
        torch.tensor([[0, 3], [1, -1], [2, 5], [3, 0], [-1, -1], [6, 5], [6, 2]]),
    ],
)
def test_queries_that_are_keys_get_the_dense_gradient_in_one_pass(exclude):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N, D, dtype=torch.float64, generator=generator).requires_grad_()
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    positives = torch.tensor([3, 3, -1, 0, 5, 4, 3])

    def derivatives(implementation):
        losses = info_nce(
            rows,
            rows,
            temperature=temperature,
            positives=positives,
            exclude=exclude,
            reduction="none",
            implementation=implementation,
        )
        first = torch.autograd.grad(
            (losses * torch.arange(1.0, N + 1)).sum(), (rows, temperature), create_graph=True
        )
        return losses, *first, *torch.autograd.grad(first[0].square().sum() + first[1], (rows, temperature))

    close(derivatives("chunked"), derivatives("reference"))
