import pytest
import torch
from torch import nn
from toys import assert_same_loss, logits, toy_images, toy_method, unit

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
    assert_same_loss(found, expected, [pair])


def test_simclr_s_loss_and_gradient_are_lightly_s():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    pair = projections()
    found = toy(temperature=0.2).loss(Outputs(pair, pair))
    expected = lightly.NTXentLoss(temperature=0.2)(pair[0], pair[1])
    assert_same_loss(found, expected, [pair], rtol=1e-6, slopes=(1e-5, 1e-9))


def test_simclr_s_pi_is_the_softmax_over_the_other_view_in_both_directions():
    pair = projections()
    for view, pi in enumerate(toy(temperature=0.3).similarity(Outputs(pair, pair))):
        torch.testing.assert_close(logits(pi), unit(pair[view]) @ unit(pair[1 - view]).T / 0.3)


def test_features_in_place_of_views_run_the_heads_only():
    method = toy().eval()
    out = method(toy_images())
    assert torch.equal(method(features=out.features).projections, out.projections)
    with pytest.raises(ValueError, match="neither views nor features"):
        method()


def test_a_backbone_without_a_width_is_refused():
    with pytest.raises(UsageError, match="num_features"):
        build_method(MethodConfig(), nn.Flatten(), RunFacts())
