"""The outer gradient of every method, scope and mode against central differences of a literal objective."""

import pytest
import torch
from method_cases import KINDS, cases

from fastgessl.config import GesslConfig
from fastgessl.objective import GeSSL

DIRECTIONS, RADIUS = 5, 1e-5
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


def unflatten(vector, weights):
    return [
        part.view_as(weight)
        for part, weight in zip(
            vector.split([w.numel() for w in weights.values()]), weights.values(), strict=True
        )
    ]


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

    method = toys.method(name)
    literal = toys.Literal(method, settings, toys.views(), query_views)
    weights = {key: weight.detach() for key, weight in toys.trainable(method).items()}
    log_target = literal.log_pi(literal.target(weights))

    def sigma_at(offset, direction):
        return literal.kl(
            log_target,
            literal.log_pi(literal.student({k: w + offset * direction[k] for k, w in weights.items()})),
        ).item()

    torch.testing.assert_close(metrics["sigma"].item(), sigma_at(0.0, weights), rtol=1e-9, atol=0)
    delta = literal.loss(literal.target(weights)) - literal.loss(weights)
    torch.testing.assert_close(metrics["delta_loss"], delta, rtol=1e-9, atol=1e-12)
    for seed in range(DIRECTIONS):
        torch.manual_seed(seed)
        flat = torch.nn.functional.normalize(torch.randn_like(gradient), dim=0)
        direction = dict(zip(weights, unflatten(flat, weights), strict=True))
        expected = (sigma_at(RADIUS, direction) - sigma_at(-RADIUS, direction)) / (2 * RADIUS)
        # 1e-5 of this directional derivative, or of a typical one where the objective happens to be level.
        assert abs(gradient @ flat - expected) <= 1e-5 * max(
            abs(expected), gradient.norm() / len(gradient) ** 0.5
        )


@pytest.mark.parametrize(
    ("name", "scope", "query", "inner_steps"), cases(["head", "all"], ["same", "fresh_views"], [1, 0, 2])
)
def test_finite_difference_mode_is_within_1e_4_of_exact(toys, name, scope, query, inner_steps):
    options = {
        "inner_steps": inner_steps,
        "inner_lr": 0.1,
        "scope": scope,
        "query": query,
        "w_ssl": 0.0,
        "w_sigma": 1.0,
    }
    query_views = toys.views(seed=9) if query == "fresh_views" else None
    exact, _ = sigma_gradient(toys, name, GesslConfig(**options), query_views)
    found, _ = sigma_gradient(
        toys, name, GesslConfig(**options, hypergradient="finite_difference"), query_views
    )
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


@every_kind
@every_scope
def test_finite_difference_mode_is_within_1e_4_of_exact_through_inner_momentum(toys, name, scope):
    options = {
        "inner_steps": 3,
        "inner_lr": 0.1,
        "inner_momentum": 0.9,
        "scope": scope,
        "w_ssl": 0.0,
        "w_sigma": 1.0,
    }
    exact, _ = sigma_gradient(toys, name, GesslConfig(**options))
    found, _ = sigma_gradient(toys, name, GesslConfig(**options, hypergradient="finite_difference"))
    assert relative(found, exact) <= 1e-4


@every_kind
@pytest.mark.parametrize("hypergradient", MODES)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_momentum_that_vanishes_is_no_momentum(toys, name, hypergradient, checkpoint):
    options = {
        "inner_steps": 2,
        "target_steps": 2,
        "inner_lr": 0.1,
        "hypergradient": hypergradient,
        "w_sigma": 1.0,
    }
    settings = GesslConfig(**options, checkpoint_inner_steps=checkpoint)
    none, _ = sigma_gradient(toys, name, settings)
    some, _ = sigma_gradient(toys, name, settings.model_copy(update={"inner_momentum": 1e-13}))
    tolerance = 1e-5 if hypergradient == "finite_difference" else 1e-10
    assert relative(some, none) <= tolerance


@pytest.mark.parametrize(("name", "scope", "inner_lr"), cases(SCOPES, [0.1, 0.01]))
def test_first_order_is_the_student_gradient_and_its_cosine_to_exact_is_reported(
    toys, name, scope, inner_lr, record_property
):
    options = {"inner_steps": 1, "inner_lr": inner_lr, "scope": scope, "w_ssl": 0.0, "w_sigma": 1.0}
    found, _ = sigma_gradient(toys, name, GesslConfig(**options, hypergradient="first_order"))

    method = toys.method(name)
    literal = toys.Literal(method, GesslConfig(**options), toys.views())
    weights = {key: weight.detach() for key, weight in toys.trainable(method).items()}
    log_target = literal.log_pi(literal.target(weights))
    student = {key: weight.requires_grad_() for key, weight in literal.student(weights).items()}
    expected = torch.autograd.grad(
        literal.kl(log_target, literal.log_pi(student)), list(student.values()), materialize_grads=True
    )
    assert relative(found, torch.cat([slope.flatten() for slope in expected])) <= 1e-9

    exact, _ = sigma_gradient(toys, name, GesslConfig(**options))
    cosine = torch.cosine_similarity(found, exact, dim=0).item()
    record_property("cosine", cosine)
    print(f"first_order against exact, {name}, scope {scope}, K 1, lr {inner_lr}: cosine {cosine:.3f}")


@every_kind
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_without_inner_steps_only_are_exact_and_first_order_the_same(toys, name, inner_steps):
    options = {"inner_steps": inner_steps, "inner_lr": 0.1, "w_ssl": 0.0, "w_sigma": 1.0}
    exact, first_order = (
        sigma_gradient(toys, name, GesslConfig(**options, hypergradient=mode))[0]
        for mode in ("exact", "first_order")
    )
    assert torch.equal(exact, first_order) == (inner_steps == 0)


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
