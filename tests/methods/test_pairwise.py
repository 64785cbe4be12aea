import pytest
import torch

from fastgessl.methods import pairwise
from fastgessl.methods.pairwise import mean_absolute_difference, pairwise_scores


def operands(rows=7, columns=5, hidden=3):
    torch.manual_seed(0)
    shapes = ((rows, hidden), (columns, hidden), (hidden,))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def dense(first, second, weight):
    return (first[:, None] - second).relu() @ weight


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_scores_and_their_derivatives_of_both_orders_are_those_of_the_dense_tensor(monkeypatch, block):
    monkeypatch.setattr(pairwise, "BLOCK_NUMBERS", block)
    inputs = operands()
    slope = torch.randn(7, 5, dtype=torch.float64)
    along = [torch.randn_like(each) for each in inputs]
    found, expected = [], []
    for function, kept in ((pairwise_scores, found), (dense, expected)):
        scores = function(*inputs)
        first = torch.autograd.grad(scores.tanh(), inputs, slope, create_graph=True)
        second = torch.autograd.grad(first, inputs, along)
        kept += [scores, *first, *second]
    for ours, literal in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-12)


def test_scores_pass_gradcheck_and_gradgradcheck():
    assert torch.autograd.gradcheck(pairwise_scores, operands()) and torch.autograd.gradgradcheck(
        pairwise_scores, operands()
    )


def test_a_third_derivative_is_refused():
    first, second, weight = operands()
    (slope,) = torch.autograd.grad(
        pairwise_scores(first, second, weight).square().sum(), first, create_graph=True
    )
    (curvature,) = torch.autograd.grad(slope.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(curvature.sum(), first)


def test_memory_does_not_hold_a_number_for_each_pair_and_unit():
    rows, hidden = 256, 64
    first, second, weight = (
        torch.randn(shape, requires_grad=True) for shape in ((rows, hidden), (rows, hidden), (hidden,))
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        pairwise_scores(first, second, weight)
    assert sum(saved) <= 2 * rows * hidden + hidden


def test_the_mean_absolute_difference_is_that_of_every_pair():
    first, second, _ = operands()
    for one, other in ((first, second), (first, first)):
        expected = (one[:, None] - other).abs().mean((0, 1))
        found = mean_absolute_difference(one, other)
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(value.sum(), first)[0] for value in (found, expected)]
        torch.testing.assert_close(slopes[0], slopes[1])
