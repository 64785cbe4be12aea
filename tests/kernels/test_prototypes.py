"""SwAV's assignment and the mean assignment, against the published algorithm and dense autograd."""

import pytest
import torch
from torch.nn.functional import normalize

from fastgessl.kernels import sinkhorn_potentials, softmax_marginal

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def swav_assignment(scores, epsilon, iterations):
    """Algorithm 1 of Caron et al. 2020, in linear space: divide by row and column sums in turn."""
    codes = torch.exp(scores / epsilon).T
    codes = codes / codes.sum()
    prototypes, samples = codes.shape
    for _ in range(iterations):
        codes = codes / codes.sum(1, keepdim=True) / prototypes
        codes = codes / codes.sum(0, keepdim=True) / samples
    return (codes * samples).T


@IMPLEMENTATIONS
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_softmax_with_the_potentials_is_swavs_assignment(iterations, implementation):
    torch.manual_seed(0)
    query, prototypes = (normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (12, 5))
    bias = sinkhorn_potentials(
        query, prototypes, epsilon=0.1, iterations=iterations, implementation=implementation
    )
    found = (query @ prototypes.T / 0.1 + bias).softmax(1)
    torch.testing.assert_close(found, swav_assignment(query @ prototypes.T, 0.1, iterations))
    assert bias.mean().abs() < 1e-12


def test_potentials_of_float16_scores_do_not_overflow():
    query = normalize(torch.randn(32, 8), dim=1)
    found = sinkhorn_potentials(query.half(), query[:6].half(), epsilon=0.005)
    assert found.isfinite().all()
    torch.testing.assert_close(
        found,
        sinkhorn_potentials(query.half().double(), query[:6].half().double(), epsilon=0.005).float(),
        atol=2e-4,
        rtol=0,
    )


def test_potentials_carry_no_gradient():
    query = torch.randn(4, 3, requires_grad=True)
    assert not sinkhorn_potentials(query, query).requires_grad


@pytest.mark.parametrize(
    "options, message",
    [({"epsilon": 0.0}, "epsilon must be positive"), ({"iterations": 0}, "iterations must be at least 1")],
)
def test_potentials_refuse_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_potentials(torch.ones(2, 2), torch.ones(2, 2), **options)


@IMPLEMENTATIONS
def test_marginal_is_the_mean_softmax_and_sums_to_one(implementation):
    query, key, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (9, 4), (9,)))
    found = softmax_marginal(query, key, temperature=0.4, bias=bias, implementation=implementation)
    expected = torch.stack([(row @ key.T / 0.4 + bias).softmax(0) for row in query]).mean(0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(), torch.ones((), dtype=torch.float64))
