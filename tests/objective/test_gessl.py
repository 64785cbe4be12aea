"""What one call of the objective may and may not change, and what its options mean."""

import copy

import pytest
import torch
from method_cases import ALL, cases

from fastgessl.config import GesslConfig, UsageError
from fastgessl.methods import METHODS
from fastgessl.objective import GeSSL, measure_sigma

every_method = pytest.mark.parametrize("name", ALL)
MODES = ("exact", "first_order", "finite_difference")


def plain_step(toys, method, views):
    """One forward, one loss, one backward, without the objective."""
    targets = method.targets(views)
    loss = method.loss(method(views), targets)
    loss.backward()
    return loss


def same_state(method, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(method.state_dict().values(), other.state_dict().values(), strict=True)
    )


@every_method
def test_without_sigma_loss_and_gradient_are_the_plain_ones_bit_for_bit(toys, name):
    method, plain = toys.method(name), toys.method(name)
    result = GeSSL(method, GesslConfig())(toys.views())
    result.loss.backward()
    loss = plain_step(toys, plain, toys.views())
    assert torch.equal(result.loss, loss) and torch.equal(result.metrics["loss_ssl"], loss)
    assert set(result.metrics) == {"loss_ssl", *plain.measures(result.outputs, result.targets)}
    assert torch.equal(toys.gradients(method), toys.gradients(plain))


@pytest.mark.parametrize(
    ("name", "scope", "hypergradient", "query"), cases(["all", "head"], MODES, ["fresh_views", "same"])
)
def test_buffers_momentum_encoder_and_random_state_equal_those_of_one_plain_forward(
    toys, name, scope, hypergradient, query
):
    method, plain = toys.method(name, dropout=0.2), toys.method(name, dropout=0.2)
    settings = GesslConfig(
        inner_steps=2,
        target_steps=2,
        inner_lr=0.1,
        hypergradient=hypergradient,
        scope=scope,
        query=query,
        w_sigma=1.0,
    )
    torch.manual_seed(3)
    result = GeSSL(method, settings)(toys.views(), 0, toys.views(seed=9))
    result.loss.backward()
    after = torch.rand(4)
    torch.manual_seed(3)
    plain_step(toys, plain, toys.views())
    assert same_state(method, plain)
    assert torch.equal(after, torch.rand(4))


@every_method
def test_the_update_of_the_state_after_the_objective_is_that_after_a_plain_step(toys, name):
    method, plain = toys.method(name), toys.method(name)
    result = GeSSL(method, GesslConfig(inner_steps=1, w_sigma=1.0))(toys.views())
    method.update_state([(result.outputs, result.targets)], step=3)
    views = toys.views()
    targets = plain.targets(views)
    plain.update_state([(plain(views), targets)], step=3)
    assert same_state(method, plain)
    assert not result.outputs.projections.requires_grad and not result.outputs.features.requires_grad


def test_sigma_is_computed_on_every_mth_step_only(toys):
    objective = GeSSL(toys.method("simclr"), GesslConfig(every=3, w_sigma=1.0))
    assert [step for step in range(7) if "sigma" in objective(toys.views(), step).metrics] == [0, 3, 6]


@pytest.mark.parametrize(("inner_lr", "kept"), [(0.01, True), (1e3, False)])
def test_the_gate_drops_sigma_where_the_target_has_a_higher_loss(toys, inner_lr, kept):
    options = {"inner_lr": inner_lr, "w_sigma": 1.0}
    method, plain = toys.method("simclr"), toys.method("simclr")
    result = GeSSL(method, GesslConfig(**options, gate=True))(toys.views())
    result.loss.backward()
    assert (result.metrics["delta_loss"] <= 0).item() == kept
    GeSSL(plain, GesslConfig(**options) if kept else GesslConfig())(toys.views()).loss.backward()
    assert result.metrics["sigma"] > 0
    torch.testing.assert_close(toys.gradients(method), toys.gradients(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("scope", "hypergradient"), [("all", "exact"), ("all", "first_order"), ("head", "exact")]
)
def test_every_forward_of_a_step_drops_the_same_units(toys, scope, hypergradient):
    # With a vanishing inner_lr student and target are the same model, so only different dropout masks could
    # tell them apart.
    method = toys.method("simclr", dropout=0.5)
    settings = GesslConfig(
        inner_steps=1, inner_lr=1e-12, scope=scope, hypergradient=hypergradient, w_sigma=1.0
    )
    for inner_steps in (0, 1):
        result = GeSSL(method, settings.model_copy(update={"inner_steps": inner_steps}))(toys.views())
        assert result.metrics["sigma"].abs() < 1e-12 and result.metrics["delta_loss"].abs() < 1e-9


def test_query_views_that_are_missing_are_asked_for(toys):
    objective = GeSSL(toys.method("simclr"), GesslConfig(query="fresh_views", w_sigma=1.0))
    with pytest.raises(UsageError, match="no query_views were given"):
        objective(toys.views())


@pytest.mark.parametrize(("name", "scope", "inner_steps"), cases(["head", "all"], [2, 0]))
def test_measure_sigma_is_the_objective_s_sigma_and_leaves_everything_as_it_was(
    toys, name, scope, inner_steps
):
    settings = GesslConfig(inner_steps=inner_steps, target_steps=2, inner_lr=0.1, scope=scope, w_sigma=1.0)
    method = toys.method(name)
    before = copy.deepcopy(method)
    method.eval()
    torch.manual_seed(5)
    with torch.no_grad():
        sigma = measure_sigma(method, settings, toys.views())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert (
        same_state(method, before)
        and not method.training
        and all(p.grad is None for p in method.parameters())
    )
    expected = GeSSL(before, settings)(toys.views()).metrics["sigma"].item()
    assert sigma == pytest.approx(expected, rel=1e-9)


def test_a_scope_without_parameters_is_refused(toys):
    method = toys.method("simclr")
    method.projector.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to adapt"):
        GeSSL(method, GesslConfig(scope="head", w_sigma=1.0))
    GeSSL(method, GesslConfig(w_sigma=1.0))


@pytest.mark.parametrize(("name", "hypergradient"), cases(MODES))
def test_the_alpha_of_the_step_is_the_one_that_is_given(toys, name, hypergradient):
    options = {"inner_steps": 1, "hypergradient": hypergradient, "w_sigma": 1.0}
    given, fixed = toys.method(name), toys.method(name)
    scheduled = GesslConfig(**options, inner_lr=7.0, inner_lr_schedule="times_lr")
    result = GeSSL(given, scheduled)(toys.views(), 0, inner_lr=0.05)
    result.loss.backward()
    expected = GeSSL(fixed, GesslConfig(**options, inner_lr=0.05))(toys.views())
    expected.loss.backward()
    assert result.metrics == expected.metrics | {"inner_lr": torch.tensor(0.05, dtype=torch.float64)}
    assert torch.equal(toys.gradients(given), toys.gradients(fixed))


@pytest.mark.parametrize("schedule", ["cosine", "times_lr"])
def test_a_scheduled_alpha_that_is_missing_is_asked_for(toys, schedule):
    objective = GeSSL(toys.method("simclr"), GesslConfig(inner_lr_schedule=schedule, every=2, w_sigma=1.0))
    with pytest.raises(UsageError, match="no inner_lr was given"):
        objective(toys.views())
    objective(toys.views(), step=1)


def test_an_alpha_of_zero_measures_nothing_and_teaches_nothing(toys):
    method = toys.method("simclr")
    settings = GesslConfig(
        inner_steps=1, hypergradient="finite_difference", inner_lr_schedule="times_lr", w_ssl=0.0, w_sigma=1.0
    )
    result = GeSSL(method, settings)(toys.views(), 0, inner_lr=0.0)
    result.loss.backward()
    assert result.metrics["sigma"] == 0 and result.metrics["delta_loss"] == 0
    assert toys.gradients(method).abs().max() < 1e-12


@every_method
@pytest.mark.parametrize("count", [0, 1, 3])
def test_more_or_fewer_views_than_the_method_takes_are_refused(toys, name, count):
    views, multi_crop = (toys.views() + toys.views())[:count], METHODS[name].multi_crop
    if multi_crop and count > 2:
        pytest.skip(f"{name} takes any number of further views")
    wanted = f"needs {'at least ' * multi_crop}2 views"
    for objective in (
        GeSSL(toys.method(name), GesslConfig()),
        GeSSL(toys.method(name), GesslConfig(query="fresh_views", w_sigma=1.0)),
    ):
        with pytest.raises(UsageError, match=f"{wanted} of each sample and was given {count}"):
            objective(views, 1)
    with pytest.raises(UsageError, match=wanted):
        objective(toys.views(), 0, views)
    with pytest.raises(UsageError, match=wanted):
        measure_sigma(toys.method(name), GesslConfig(), views)


def test_views_of_different_samples_are_refused(toys):
    first, second = toys.views()
    with pytest.raises(UsageError, match=r"have \[8, 7\] rows"):
        GeSSL(toys.method("simclr"), GesslConfig())([first, second[:7]])
