"""Which implementation runs and how a user decides; small tables on a CPU, which are stored because that is
faster, give the same results.
"""

import sys
import types

import pytest
import torch
from torch.func import grad, vmap

from fastgessl.kernels import (
    backend,
    clip_loss,
    gessl_loss,
    implementation_for,
    info_nce,
    losses,
    nt_xent,
    reference,
    sigma_kl,
    similarity_logsumexp,
    soft_cross_entropy,
)
from fastgessl.kernels.backend import ENVIRONMENT


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_the_argument_beats_the_environment_and_the_environment_the_default(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert implementation_for(torch.zeros(2, 2)) == (
        "reference",
        f"the environment variable {ENVIRONMENT} says so",
    )
    assert implementation_for(torch.zeros(2, 2), "chunked")[0] == "chunked"


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
        monkeypatch.setattr(backend, "triton_version", lambda: triton)
        monkeypatch.setattr(
            backend.importlib.util, "find_spec", lambda name: None if triton is None else object()
        )
        backend._device_obstacle.cache_clear()

    yield pretend
    backend._device_obstacle.cache_clear()


def test_tritons_version_is_that_of_the_module_whatever_its_distribution_is_called(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "triton", types.SimpleNamespace(__version__="3.2.0+of.another.distribution")
    )
    assert backend._triton_release() == (3, 2)


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
        found = [backend._device_obstacle(0) for _ in range(3)]
    assert len(caught) == 1 and found[0] == found[1] == found[2] and reason.split(",")[0] in found[0]


@pytest.mark.parametrize(
    "capability, triton",
    [((8, 0), "3.2.0"), ((8, 9), "3.2.0"), ((9, 0), "3.2.0"), ((10, 0), "3.3.1"), ((12, 0), "3.9.0")],
)
def test_a_supported_card_takes_triton_without_a_word(card, capability, triton, recwarn):
    card(capability, triton)
    assert backend._device_obstacle(0) is None and not recwarn.list


LOSSES = {
    "info_nce": lambda q, k, how: info_nce(
        q, k, positives=torch.tensor([2, -1, 0, 4, 4]), implementation=how
    ),
    "clip_loss": lambda q, k, how: clip_loss(q, k[:5], temperature=0.3, implementation=how),
    "logsumexp": lambda q, k, how: (
        similarity_logsumexp(q, k, bias=k[:, 0], implementation=how).square().sum()
    ),
    "sigma_kl": lambda q, k, how: sigma_kl(
        q, k, k[:5], k.flip(0), teacher_temperature=0.3, implementation=how
    ),
    "soft_cross_entropy": lambda q, k, how: soft_cross_entropy(q, k, k[:5], k.flip(0), implementation=how),
    "gessl_loss": lambda q, k, how: (
        torch.stack(gessl_loss(q, k, k[:5], k.flip(0), implementation=how)).square().sum()
    ),
}


@pytest.fixture
def stored(monkeypatch):
    """Names of the dense definitions that were called."""
    monkeypatch.setattr(backend, "SMALL_TABLE", 1 << 20)
    called = []
    for name in ("info_nce", "clip_loss", "similarity_logsumexp", "sigma_kl", "soft_cross_entropy"):
        original = getattr(reference, name)

        def watched(*arguments, name=name, original=original):
            called.append(name)
            return original(*arguments)

        monkeypatch.setattr(reference, name, watched)
    return called


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return 0.3 * torch.randn(5, 3, dtype=torch.float64), 0.3 * torch.randn(7, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_a_small_table_is_stored_and_every_transform_gives_what_blocks_give(name, operands, stored):
    def results(how):
        def loss(query, key):
            return LOSSES[name](query, key, how)

        def along(query, key):
            return sum((g * g.detach().sin()).sum() for g in grad(loss, (0, 1))(query, key))

        batch = torch.stack([operands[0], operands[0].flip(0)])
        return (
            loss(*operands),
            grad(loss, (0, 1))(*operands),
            grad(along, (0, 1))(*operands),
            vmap(grad(loss), (0, None))(batch, operands[1]),
        )

    found = results(None)
    assert stored
    stored.clear()
    torch.testing.assert_close(found, results("chunked"), rtol=1e-10, atol=1e-12)
    assert not stored


@pytest.mark.parametrize("why", ["large", "excluded", "compiled", "environment"])
def test_what_blocks_serve_better_is_not_stored(why, operands, stored, monkeypatch):
    query, key = operands
    exclude = torch.zeros(5, dtype=torch.int64) if why == "excluded" else None
    loss = torch.compile(info_nce, backend="aot_eager", fullgraph=True) if why == "compiled" else info_nce
    if why == "large":
        monkeypatch.setattr(backend, "SMALL_TABLE", 34)
    if why == "environment":
        monkeypatch.setenv(backend.ENVIRONMENT, "chunked")
    loss(query, key, exclude=exclude)
    assert not stored
    nt_xent(query, query)  # excludes the rows themselves
    assert not stored


@pytest.mark.parametrize(
    ("name", "module", "limit", "entries"),
    [
        ("info_nce", backend, "SMALL_TABLE", 35),
        ("sigma_kl", backend, "SMALL_TABLE", 35),
        ("clip_loss", losses, "LARGEST_STORED_CLIP", 25),
        ("gessl_loss", losses, "LARGEST_STORED_GESSL", 35),
    ],
)
def test_a_table_is_stored_up_to_the_limit_that_was_measured_for_the_loss(
    name, module, limit, entries, operands, stored, monkeypatch
):
    monkeypatch.setattr(module, limit, entries - 1)
    LOSSES[name](*operands, None)
    assert not stored
    monkeypatch.setattr(module, limit, entries)
    LOSSES[name](*operands, None)
    assert stored


def test_the_limit_is_the_size_of_the_table_and_is_said(monkeypatch):
    monkeypatch.setattr(backend, "SMALL_TABLE", 1 << 20)
    assert implementation_for(torch.zeros(2, 3), entries=1 << 20) == (
        "reference",
        "on a CPU a table of 1,048,576 entries is faster stored",
    )
    assert implementation_for(torch.zeros(2, 3), entries=(1 << 20) + 1)[0] == "chunked"
    assert implementation_for(torch.zeros(2, 3))[0] == "chunked"
    assert implementation_for(torch.empty(2, 3, device="meta"), entries=6)[0] == "chunked"


def test_values_are_checked_before_a_table_is_stored(operands, stored):
    query, key = operands
    with pytest.raises(ValueError, match=r"positives of shape \(5,\) must lie in \[-1, 7\), found \[7, 7\]"):
        info_nce(query, key, positives=torch.full((5,), 7))
    with pytest.raises(ValueError, match="temperature must be positive"):
        clip_loss(query, query, temperature=torch.tensor(-1.0))
