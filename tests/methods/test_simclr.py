import pytest
import torch
from methods.lightly_heads import assert_heads_agree
from torch import nn
from toys import toy_method

from fastgessl.config import MethodConfig, UsageError
from fastgessl.methods import Outputs, RunFacts, build_method


def toy(negatives="local", temperature=0.5):
    return toy_method("simclr", RunFacts(negatives=negatives), temperature=temperature)


def projections(seed=0, images=7):
    torch.manual_seed(seed)
    return torch.randn(2, images, 4, dtype=torch.float64, requires_grad=True)


def nt_xent_by_definition(pair, temperature):
    """Chen et al. 2020, eq. (1), one pair of rows at a time."""
    rows = torch.cat(list(pair))
    rows = rows / rows.norm(dim=1, keepdim=True)
    images, terms = len(rows) // 2, []
    for i in range(len(rows)):
        others = [torch.exp(rows[i] @ rows[k] / temperature) for k in range(len(rows)) if k != i]
        terms.append(
            -torch.log(torch.exp(rows[i] @ rows[(i + images) % len(rows)] / temperature) / sum(others))
        )
    return torch.stack(terms).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("negatives", ["local", "global"])
def test_simclr_s_loss_and_gradient_are_nt_xent_by_definition(temperature, negatives):
    pair = projections()
    found = toy(negatives, temperature).loss(Outputs(pair, pair))
    expected = nt_xent_by_definition(pair, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(loss, pair)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-14)


def test_simclr_s_loss_and_gradient_are_lightly_s():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    pair = projections()
    found, expected = (
        toy(temperature=0.2).loss(Outputs(pair, pair)),
        lightly.NTXentLoss(temperature=0.2)(pair[0], pair[1]),
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(loss, pair)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-9)


def test_the_projector_and_its_gradients_are_lightly_s():
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is the oracle here")
    assert_heads_agree(
        toy().projector,
        heads.SimCLRProjectionHead(6, 8, 4).double(),
        rows=torch.randn(5, 6, dtype=torch.float64),
    )


def test_simclr_s_pi_is_the_softmax_over_the_other_view_in_both_directions():
    method, pair = toy(temperature=0.3), projections()
    unit = pair / pair.norm(dim=-1, keepdim=True)
    forward, backward = method.similarity(Outputs(pair, pair))
    torch.testing.assert_close(forward.query @ forward.key.T / forward.temperature, unit[0] @ unit[1].T / 0.3)
    torch.testing.assert_close(
        backward.query @ backward.key.T / backward.temperature, unit[1] @ unit[0].T / 0.3
    )


def test_simclr_keeps_no_state_but_batch_norm():
    method = toy()
    views = [torch.randn(5, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    out = method(views)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.loss(out), method.similarity(out), method.update_state([(out, None)], 0)
    assert method.targets(views) is None
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


def test_features_in_place_of_views_run_the_heads_only():
    method = toy().eval()
    views = [torch.randn(5, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    out = method(views)
    assert torch.equal(method(features=out.features).projections, out.projections)
    with pytest.raises(ValueError, match="neither views nor features"):
        method()


def test_a_backbone_without_a_width_is_refused():
    with pytest.raises(UsageError, match="num_features"):
        build_method(MethodConfig(), nn.Flatten(), RunFacts())
