import pytest
import torch
from toys import assert_same_loss, logits, toy_method, unit

from fastgessl.methods import Outputs


def outputs_and_targets(crops=2):
    torch.manual_seed(0)
    predictions, targets = (torch.randn(views, 7, 4, dtype=torch.float64) for views in (crops, 2))
    return Outputs(predictions, predictions, predictions.requires_grad_()), targets


@pytest.mark.parametrize("crops", [2, 5])
def test_byol_s_loss_is_the_squared_distance_of_unit_vectors_averaged_over_the_views_that_predict_a_target(
    crops,
):
    out, targets = outputs_and_targets(crops)
    distances = (unit(out.predictions)[:, None] - unit(targets)).square().sum(-1).mean(-1)
    expected = sum(
        distances[view, target] / (crops - 1) for view in range(crops) for target in (0, 1) if view != target
    )
    assert_same_loss(toy_method("byol").loss(out, targets), expected, [out.predictions])


def test_byol_s_loss_and_gradient_are_lightly_s_negative_cosine_similarity_up_to_its_constants():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    out, targets = outputs_and_targets()
    criterion = lightly.NegativeCosineSimilarity()
    expected = sum(2 + 2 * criterion(out.predictions[view], targets[1 - view]) for view in (0, 1))
    found = toy_method("byol").loss(out, targets)
    assert_same_loss(found, expected, [out.predictions], rtol=1e-6, slopes=(1e-6, 1e-10))


def test_byol_s_pi_is_the_softmax_of_predictions_over_the_other_view_s_momentum_projections():
    out, targets = outputs_and_targets()
    for view, pi in enumerate(toy_method("byol", temperature=0.3).similarity(out, targets)):
        expected = torch.cosine_similarity(out.predictions[view, :, None], targets[1 - view, None], dim=-1)
        torch.testing.assert_close(logits(pi), expected / 0.3)
