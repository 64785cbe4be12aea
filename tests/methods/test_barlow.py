import pytest
import torch
from methods.lightly_heads import assert_heads_agree
from torch import nn
from toys import toy_method

from fastgessl.methods import Outputs


def toy(**options):
    return toy_method("barlow", **options)


def projections(seed=0, images=9, width=4):
    torch.manual_seed(seed)
    return torch.randn(2, images, width, dtype=torch.float64, requires_grad=True)


def barlow_by_definition(pair, weight, scale, epsilon=1e-5):
    """Zbontar et al. 2021, eq. (1) and (2), one pair of output units at a time."""
    images, width = pair.shape[1:]
    first, second = (
        [(unit - unit.mean()) / (unit.var(correction=0) + epsilon).sqrt() for unit in view.T] for view in pair
    )
    loss = 0.0
    for i in range(width):
        for j in range(width):
            correlation = (first[i] * second[j]).sum() / images
            loss = loss + ((1 - correlation) ** 2 if i == j else weight * correlation**2)
    return scale * loss


@pytest.mark.parametrize(("weight", "scale"), [(0.0051, 1.0), (0.5, 0.1)])
def test_barlow_s_loss_and_gradient_are_those_of_the_definition(weight, scale):
    pair = projections()
    found = toy(redundancy_weight=weight, loss_scale=scale).loss(Outputs(pair, pair))
    expected = barlow_by_definition(pair, weight, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(loss, pair)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-13)


def test_barlow_s_loss_and_gradient_are_lightly_s():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    pair = projections(images=16).detach().float().requires_grad_()
    found = toy(redundancy_weight=0.02).loss(Outputs(pair, pair))
    expected = lightly.BarlowTwinsLoss(lambda_param=0.02)(pair[0], pair[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(loss, pair)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


def test_barlow_s_loss_can_be_differentiated_twice():
    pair = projections(images=5, width=3)
    assert torch.autograd.gradgradcheck(lambda rows: toy().loss(Outputs(rows, rows)), (pair,))


def test_barlow_s_pi_is_the_softmax_over_the_other_view_s_standardised_embeddings():
    pair = projections()
    method = toy(temperature=0.3)
    standard = (pair - pair.mean(1, keepdim=True)) / (pair.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    for view, pi in enumerate(method.similarity(Outputs(pair, pair))):
        expected = torch.cosine_similarity(standard[view, :, None], standard[1 - view, None], dim=-1) / 0.3
        torch.testing.assert_close(pi.query @ pi.key.T / pi.temperature, expected)


def test_barlow_s_measures_add_up_to_its_loss():
    pair = projections()
    method = toy(loss_scale=0.1)
    out = Outputs(pair, pair)
    terms = method.measures(out)
    torch.testing.assert_close(0.1 * (terms["invariance"] + terms["redundancy"]), method.loss(out))


def test_the_projector_of_three_layers_and_its_gradients_are_lightly_s():
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is the oracle here")
    oracle = heads.BarlowTwinsProjectionHead(6, 8, 4).double()
    assert_heads_agree(toy(projector_layers=3).projector, oracle, rows=torch.randn(9, 6, dtype=torch.float64))


def test_barlow_s_projector_has_as_many_layers_as_asked_for():
    layers = [layer for layer in toy(projector_layers=3).projector if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(6, 8), (8, 8), (8, 4)]
