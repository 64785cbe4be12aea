"""Measures of soft assignments, where float32 runs out."""

import torch

from fastgessl.kernels import softmax_marginal
from fastgessl.kernels.prototypes import entropy_of_mean


def test_the_entropy_of_the_mean_has_finite_gradients_where_nobody_takes_a_prototype():
    query, key = torch.eye(3, requires_grad=True), torch.cat([torch.eye(3), -torch.ones(1, 3)])
    assert softmax_marginal(query, key, temperature=1e-2)[3] == 0
    entropy = entropy_of_mean(query, key, 1e-2, None)
    torch.testing.assert_close(entropy, torch.tensor(3.0).log())
    first = torch.autograd.grad(entropy, query, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), query)[0]
    assert first.isfinite().all() and second.isfinite().all()
