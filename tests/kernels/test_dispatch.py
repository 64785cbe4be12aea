"""Which implementation runs, and how a user decides."""

import sys
import types

import pytest
import torch

from fastgessl.kernels import backend as dispatch
from fastgessl.kernels import implementation_for, info_nce
from fastgessl.kernels.backend import ENVIRONMENT


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_cpu_tensors_take_the_chunked_implementation_with_a_reason():
    name, reason = implementation_for(torch.zeros(2, 2))
    assert name == "chunked" and reason


def test_the_argument_beats_the_environment_and_the_environment_the_default(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert implementation_for(torch.zeros(2, 2)) == (
        "reference",
        f"the environment variable {ENVIRONMENT} says so",
    )
    assert implementation_for(torch.zeros(2, 2), "chunked")[0] == "chunked"


def test_the_environment_reaches_the_losses(monkeypatch):
    query = torch.eye(2).requires_grad_()
    first = torch.autograd.grad(info_nce(query, query, implementation="reference"), query, create_graph=True)[
        0
    ]
    monkeypatch.setenv(ENVIRONMENT, "reference")
    loss = torch.autograd.grad(info_nce(query, query), query, create_graph=True)[0]
    torch.testing.assert_close(loss, first)
    second = torch.autograd.grad(loss.square().sum(), query, create_graph=True)[0]
    torch.autograd.grad(second.square().sum(), query)  # third order: only the reference has it


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_an_unknown_or_unusable_name_is_refused(source, monkeypatch):
    for name, message in (
        ("fast", "unknown implementation 'fast'"),
        ("triton", "Triton kernels cannot be used"),
    ):
        if source == "environment":
            monkeypatch.setenv(ENVIRONMENT, name)
        with pytest.raises(ValueError, match=message):
            info_nce(torch.eye(2), torch.eye(2), implementation=name if source == "argument" else None)


@pytest.fixture
def card(monkeypatch):
    """Pretend that the present GPU is another one; what was found out about it before is forgotten."""

    def pretend(capability, triton="3.9.0", hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some Card")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(dispatch, "triton_version", lambda: triton)
        monkeypatch.setattr(
            dispatch.importlib.util, "find_spec", lambda name: None if triton is None else object()
        )
        dispatch._device_obstacle.cache_clear()

    yield pretend
    dispatch._device_obstacle.cache_clear()


def test_tritons_version_is_that_of_the_module_whatever_its_distribution_is_called(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "triton", types.SimpleNamespace(__version__="3.2.0+of.another.distribution")
    )
    assert dispatch._triton_release() == (3, 2)


@pytest.mark.parametrize(
    "unsupported, reason",
    [
        ({"capability": (7, 5)}, "Some Card is older than compute capability 8.0"),
        ({"capability": (9, 0), "hip": "6.0"}, "NVIDIA cards only"),
        ({"capability": (9, 0), "triton": None}, "triton is not installed"),
        ({"capability": (10, 0), "triton": "3.2.0"}, "needs triton 3.3 or newer, found 3.2.0"),
        ({"capability": (12, 0), "triton": "3.2.0"}, "needs triton 3.3 or newer"),
    ],
)
def test_an_unsupported_card_falls_back_with_one_warning(card, unsupported, reason):
    card(**unsupported)
    with pytest.warns(UserWarning, match=f"runs as chunked PyTorch on this GPU: .*{reason}") as caught:
        found = [dispatch._device_obstacle(0) for _ in range(3)]
    assert len(caught) == 1 and found[0] == found[1] == found[2] and reason.split(",")[0] in found[0]


@pytest.mark.parametrize(
    "capability, triton",
    [((8, 0), "3.2.0"), ((8, 9), "3.2.0"), ((9, 0), "3.2.0"), ((10, 0), "3.3.1"), ((12, 0), "3.9.0")],
)
def test_a_supported_card_takes_triton_without_a_word(card, capability, triton, recwarn):
    card(capability, triton)
    assert dispatch._device_obstacle(0) is None and not recwarn.list
