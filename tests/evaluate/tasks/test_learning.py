import copy

import pytest
import torch
from torch import nn
from toys import toy_method

from fastgessl.config import GesslConfig, MethodConfig, UsageError
from fastgessl.evaluate.tasks.learning import adapt
from fastgessl.methods import RunFacts, build_method


@pytest.fixture
def method() -> nn.Module:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8))
    backbone.num_features = 8
    return build_method(
        MethodConfig(name="simclr", projector_hidden=16, projector_out=8), backbone, RunFacts()
    )


@pytest.fixture
def views() -> list[torch.Tensor]:
    first = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return [first, first + 0.5 * torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(2))]


def descended(method: nn.Module, views: list[torch.Tensor], lr: float, steps: int) -> nn.Module:
    """A copy after `steps` of torch's own SGD."""
    model = copy.deepcopy(method).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(model(views)).backward()
        optimizer.step()
    return model


def log_rows(model: nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
    """log π of the task, both directions, written out."""
    with torch.no_grad():
        return torch.cat(
            [
                (pi.query @ pi.key.T / pi.temperature).log_softmax(dim=1)
                for pi in model.similarity(model(views))
            ]
        )


@pytest.mark.parametrize("inner_steps", [0, 2])
def test_sigma_is_the_divergence_from_the_model_after_k_steps_to_its_copy_after_more(
    method, views, inner_steps
):
    settings = GesslConfig(inner_steps=inner_steps, inner_lr=0.05)
    student, teacher = (
        log_rows(descended(method, views, 0.05, steps), views) for steps in (inner_steps, inner_steps + 20)
    )
    expected = (teacher.exp() * (teacher - student)).sum(dim=1).mean().item()

    found = adapt(method, settings, views, max_steps=20)

    assert found["sigma"] == pytest.approx(expected, rel=1e-3)
    assert found["steps"] == 20 and found["loss_after"] < found["loss_before"]


def test_swav_s_codes_are_those_of_the_model_itself():
    """At every step new ones would be another task at every step."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    backbone.num_features = 8
    swav = toy_method("swav", backbone=backbone, prototypes=6, queue_length=0)
    views = list(torch.randn(2, 12, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double())
    model = copy.deepcopy(swav).train()
    codes = model.settle(model(views).detached(), model.targets(views))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model.loss(model(views), codes).backward()
        optimizer.step()

    found = adapt(swav, GesslConfig(inner_steps=0, inner_lr=0.1), views, max_steps=20)

    assert found["loss_after"] == pytest.approx(model.loss(model(views), codes).item(), rel=1e-9)


def test_a_model_that_is_its_own_converged_copy_has_no_sigma(method, views):
    expert = descended(method, views, 0.5, 600)

    novice, settled = (
        adapt(model, GesslConfig(inner_lr=0.1), views, max_steps=30) for model in (method, expert)
    )

    assert settled["sigma"] < 0.02 * novice["sigma"]


def test_the_steps_end_when_the_loss_does_not_fall_any_more(method, views):
    found = adapt(method, GesslConfig(inner_lr=0.5), views, max_steps=5000)

    assert found["converged"] and found["steps"] < 5000
    assert not adapt(method, GesslConfig(inner_lr=0.001), views, max_steps=10)["converged"]


def test_the_method_is_left_as_it_was(method, views):
    before, mode = copy.deepcopy(method.state_dict()), method.eval().training

    adapt(method, GesslConfig(inner_steps=1), views)

    assert method.training == mode
    assert all(value.equal(before[name]) for name, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_a_loss_that_is_not_finite_is_refused(method, views):
    with pytest.raises(
        UsageError,
        match=r"Task learning: the task-specific copy diverged .* Choose a smaller --gessl.inner_lr",
    ):
        adapt(method, GesslConfig(), [view * float("nan") for view in views])
