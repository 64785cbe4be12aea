"""The outer gradient of every method, scope and mode against central differences of a literal objective."""

import pytest
import torch
from method_cases import KINDS, cases
from smooth_toys import assert_slopes_agree

from fastgessl.config import GesslConfig
from fastgessl.objective import GeSSL

SCOPES, MODES = ("all", "head"), ("exact", "first_order", "finite_difference")
# (views that sigma is seen on, K, lambda)
STEPS = [
    ("same", 1, 1),
    *(("same", steps, further) for steps in (0, 1, 2) for further in (1, 2) if (steps, further) != (1, 1)),
]
STEPS += [("fresh_views", steps, 1) for steps in (0, 1, 2)]
every_kind = pytest.mark.parametrize("name", KINDS)
every_scope = pytest.mark.parametrize("scope", SCOPES)


def sigma_gradient(toys, name, settings, query_views=None):
    method = toys.method(name)
    result = GeSSL(method, settings)(toys.views(), 0, query_views)
    result.loss.backward()
    return toys.gradients(method), result.metrics


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "steps", "scope"), cases(STEPS, SCOPES))
def test_exact_mode_equals_central_differences_of_the_outer_objective(toys, name, steps, scope):
    query, inner_steps, target_steps = steps
    settings = GesslConfig(
        inner_steps=inner_steps,
        target_steps=target_steps,
        inner_lr=0.1,
        scope=scope,
        query=query,
        w_ssl=0.0,
        w_sigma=1.0,
    )
    check_against_central_differences(toys, name, settings)


@every_kind
@every_scope
@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("inner_steps", [0, 1, 3])
def test_exact_mode_differentiates_through_inner_momentum(toys, name, scope, momentum, inner_steps):
    options = {"inner_steps": inner_steps, "target_steps": 2, "inner_lr": 0.05, "inner_momentum": momentum}
    check_against_central_differences(toys, name, GesslConfig(**options, scope=scope, w_ssl=0.0, w_sigma=1.0))


def check_against_central_differences(toys, name, settings):
    query_views = toys.views(seed=9) if settings.query == "fresh_views" else None
    gradient, metrics = sigma_gradient(toys, name, settings, query_views)
    literal = toys.Literal(toys.method(name), settings, toys.views(), query_views)
    unmoved = literal.sigma(torch.zeros_like(gradient))
    torch.testing.assert_close(metrics["sigma"].item(), unmoved, rtol=1e-9, atol=0)
    delta = literal.loss(literal.target) - literal.loss(literal.weights)
    torch.testing.assert_close(metrics["delta_loss"], delta, rtol=1e-9, atol=1e-12)
    assert_slopes_agree(gradient, literal)


@pytest.mark.parametrize(
    ("name", "scope", "query", "inner"),
    cases(["head", "all"], ["same", "fresh_views"], [(1, 0.0), (0, 0.0), (2, 0.0), (3, 0.9)]),
)
def test_finite_difference_mode_is_within_1e_4_of_exact(toys, name, scope, query, inner):
    options = {"inner_steps": inner[0], "inner_momentum": inner[1], "inner_lr": 0.1, "scope": scope}
    settings = GesslConfig(**options, query=query, w_ssl=0.0, w_sigma=1.0)
    query_views = toys.views(seed=9) if query == "fresh_views" else None
    exact, _ = sigma_gradient(toys, name, settings, query_views)
    differences = settings.model_copy(update={"hypergradient": "finite_difference"})
    found, _ = sigma_gradient(toys, name, differences, query_views)
    assert relative(found, exact) <= 1e-4


@every_kind
@every_scope
@pytest.mark.parametrize("query", ["same", "fresh_views"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_made_anew_give_the_gradient_of_steps_kept_in_the_graph(toys, name, scope, query, momentum):
    options = {
        "inner_steps": 3,
        "inner_lr": 0.1,
        "inner_momentum": momentum,
        "scope": scope,
        "query": query,
        "w_sigma": 1.0,
    }
    query_views = toys.views(seed=9) if query == "fresh_views" else None
    anew, kept = (
        sigma_gradient(toys, name, GesslConfig(**options, checkpoint_inner_steps=value), query_views)
        for value in (True, False)
    )
    assert relative(anew[0], kept[0]) <= 1e-12
    assert anew[1] == kept[1]


@pytest.mark.parametrize(
    ("name", "scope", "inner"), cases(SCOPES, [(1, 0.1, 0.0), (1, 0.01, 0.0), (2, 0.1, 0.5)])
)
def test_first_order_is_the_student_gradient_and_its_cosine_to_exact_is_reported(
    toys, name, scope, inner, record_property
):
    steps, inner_lr, momentum = inner
    options = {"inner_steps": steps, "inner_lr": inner_lr, "inner_momentum": momentum, "scope": scope}
    settings = GesslConfig(**options, w_ssl=0.0, w_sigma=1.0)
    found, _ = sigma_gradient(toys, name, settings.model_copy(update={"hypergradient": "first_order"}))
    literal = toys.Literal(toys.method(name), settings, toys.views())
    student = {key: weight.requires_grad_() for key, weight in literal.student(literal.weights).items()}
    divergence = literal.kl(literal.log_pi(student))
    expected = torch.autograd.grad(divergence, list(student.values()), materialize_grads=True)
    assert relative(found, torch.cat([slope.flatten() for slope in expected])) <= 1e-9
    exact, _ = sigma_gradient(toys, name, settings)
    cosine = torch.cosine_similarity(found, exact, dim=0).item()
    record_property("cosine", cosine)
    print(f"first_order against exact, {name}, scope {scope}, K {steps}, lr {inner_lr}: cosine {cosine:.3f}")


@pytest.mark.parametrize(("name", "scope", "hypergradient"), cases(SCOPES, MODES))
def test_the_outer_gradient_is_the_weighted_sum_of_the_ssl_gradient_and_that_of_sigma(
    toys, name, scope, hypergradient
):
    options = {"inner_steps": 1, "inner_lr": 0.1, "scope": scope, "hypergradient": hypergradient}
    both, _ = sigma_gradient(toys, name, GesslConfig(**options, w_ssl=0.7, w_sigma=2.0))
    sigma_alone, _ = sigma_gradient(toys, name, GesslConfig(**options, w_ssl=0.0, w_sigma=1.0))
    method = toys.method(name)
    views = toys.views()
    targets = method.targets(views)
    method.loss(method(views), targets).backward()
    assert relative(both, 0.7 * toys.gradients(method) + 2.0 * sigma_alone) <= 1e-12
