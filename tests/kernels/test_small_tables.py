"""Small tables on a CPU are stored, because that is faster: who is sent there, and that results and
transforms stay the same.
"""

import pytest
import torch
from torch.func import grad, jvp, vmap

from fastgessl.kernels import backend as dispatch
from fastgessl.kernels import (
    clip_loss,
    distillation,
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
    monkeypatch.setattr(dispatch, "SMALL_TABLE", 1 << 20)
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

        tangents = tuple(operand.cos() for operand in operands)
        batch = torch.stack([operands[0], operands[0].flip(0)])
        return (
            loss(*operands),
            grad(loss, (0, 1))(*operands),
            grad(along, (0, 1))(*operands),
            jvp(loss, operands, tangents),
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
        monkeypatch.setattr(dispatch, "SMALL_TABLE", 34)
    if why == "environment":
        monkeypatch.setenv(dispatch.ENVIRONMENT, "chunked")
    loss(query, key, exclude=exclude)
    assert not stored
    nt_xent(query, query)  # excludes the rows themselves
    assert not stored


@pytest.mark.parametrize(
    ("name", "module", "limit", "entries"),
    [
        ("info_nce", dispatch, "SMALL_TABLE", 35),
        ("sigma_kl", dispatch, "SMALL_TABLE", 35),
        ("clip_loss", losses, "LARGEST_STORED_CLIP", 25),
        ("gessl_loss", distillation, "LARGEST_STORED_GESSL", 35),
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
    monkeypatch.setattr(dispatch, "SMALL_TABLE", 1 << 20)
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
