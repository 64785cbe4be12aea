import pytest
import torch
from toys import assert_same_loss, logits, toy_method

from fastgessl.methods import Outputs


def toy(**options):
    return toy_method("barlow", **options)


def projections(images=9, width=4, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(2, images, width, dtype=dtype, requires_grad=True)


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
    assert_same_loss(found, barlow_by_definition(pair, weight, scale), [pair], slopes=(1e-9, 1e-13))


def test_barlow_s_loss_and_gradient_are_lightly_s():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    pair = projections(images=16, dtype=torch.float32)
    found = toy(redundancy_weight=0.02).loss(Outputs(pair, pair))
    expected = lightly.BarlowTwinsLoss(lambda_param=0.02)(pair[0], pair[1])
    assert_same_loss(found, expected, [pair], rtol=1e-5, slopes=(1e-3, 1e-5))


def test_barlow_s_loss_can_be_differentiated_twice():
    pair = projections(images=5, width=3)
    assert torch.autograd.gradgradcheck(lambda rows: toy().loss(Outputs(rows, rows)), (pair,))


def test_barlow_s_pi_is_the_softmax_over_the_other_view_s_standardised_embeddings():
    pair = projections()
    standard = (pair - pair.mean(1, keepdim=True)) / (pair.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    for view, pi in enumerate(toy(temperature=0.3).similarity(Outputs(pair, pair))):
        expected = torch.cosine_similarity(standard[view, :, None], standard[1 - view, None], dim=-1) / 0.3
        torch.testing.assert_close(logits(pi), expected)


def test_barlow_s_measures_add_up_to_its_loss():
    pair = projections()
    method, out = toy(loss_scale=0.1), Outputs(pair, pair)
    terms = method.measures(out)
    torch.testing.assert_close(0.1 * (terms["invariance"] + terms["redundancy"]), method.loss(out))
