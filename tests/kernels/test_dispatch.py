"""Which implementation runs, and how a user decides."""

import pytest
import torch

from fastgessl.kernels import implementation_for, info_nce
from fastgessl.kernels.dispatch import ENVIRONMENT


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_cpu_tensors_take_the_chunked_implementation_with_a_reason():
    name, reason = implementation_for(torch.zeros(2, 2))
    assert name == "chunked" and reason


def test_the_argument_beats_the_environment_and_the_environment_the_default(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert implementation_for(torch.zeros(2, 2)) == ("reference", f"the environment variable {ENVIRONMENT} says so")
    assert implementation_for(torch.zeros(2, 2), "chunked")[0] == "chunked"


def test_the_environment_reaches_the_losses(monkeypatch):
    query = torch.eye(2).requires_grad_()
    first = torch.autograd.grad(info_nce(query, query, implementation="reference"), query, create_graph=True)[0]
    monkeypatch.setenv(ENVIRONMENT, "reference")
    loss = torch.autograd.grad(info_nce(query, query), query, create_graph=True)[0]
    torch.testing.assert_close(loss, first)
    second = torch.autograd.grad(loss.square().sum(), query, create_graph=True)[0]
    torch.autograd.grad(second.square().sum(), query)  # third order: only the reference has it


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_an_unknown_or_unusable_name_is_refused(source, monkeypatch):
    for name, message in (("fast", "unknown implementation 'fast'"), ("triton", "Triton kernels cannot be used")):
        if source == "environment":
            monkeypatch.setenv(ENVIRONMENT, name)
        with pytest.raises(ValueError, match=message):
            info_nce(torch.eye(2), torch.eye(2), implementation=name if source == "argument" else None)
