import math

import pytest
import torch
from methods.lightly_heads import assert_heads_agree
from torch import nn
from toys import toy_backbone, toy_method

from fastgessl.config import MethodConfig, ModelConfig
from fastgessl.methods import Outputs, RunFacts, build_method
from fastgessl.models import build_backbone


def toy(total_steps=10, **options):
    return toy_method("byol", RunFacts(total_steps=total_steps), toy_backbone(norm=True), **options)


def views(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(5, 3, 2, 2, dtype=torch.float64) for _ in range(2)]


def outputs_and_targets():
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 2, 7, 4, dtype=torch.float64)
    return Outputs(predictions, predictions, predictions.requires_grad_()), targets


def test_byol_s_loss_is_the_squared_distance_of_unit_vectors_summed_over_both_directions():
    out, targets = outputs_and_targets()
    unit, unit_target = (t / t.norm(dim=-1, keepdim=True) for t in (out.predictions, targets))
    expected = sum((unit[view] - unit_target[1 - view]).square().sum(1).mean() for view in (0, 1))
    torch.testing.assert_close(toy().loss(out, targets), expected, rtol=1e-12, atol=0)


def test_byol_s_loss_and_gradient_are_lightly_s_negative_cosine_similarity_up_to_its_constants():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    out, targets = outputs_and_targets()
    criterion = lightly.NegativeCosineSimilarity()
    found = toy().loss(out, targets)
    expected = sum(2 + 2 * criterion(out.predictions[view], targets[1 - view]) for view in (0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(loss, out.predictions)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("part", ["projector", "predictor"])
def test_projector_and_predictor_and_their_gradients_are_lightly_s(part):
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is the oracle here")
    ours = getattr(toy(), part)
    oracle = heads.BYOLProjectionHead(6, 8, 4) if part == "projector" else heads.BYOLPredictionHead(4, 8, 4)
    assert_heads_agree(ours, oracle.double(), rows=torch.randn(5, ours[0].in_features, dtype=torch.float64))


def test_byol_s_pi_is_the_softmax_of_predictions_over_the_other_view_s_momentum_projections():
    out, targets = outputs_and_targets()
    method = toy(temperature=0.3)
    for view, pi in enumerate(method.similarity(out, targets)):
        expected = (
            torch.cosine_similarity(out.predictions[view, :, None], targets[1 - view, None], dim=-1) / 0.3
        )
        torch.testing.assert_close(pi.query @ pi.key.T / pi.temperature, expected)


def test_the_momentum_encoder_follows_a_literal_simulation():
    """Grill et al. 2020, section 3.2: ξ ← τ ξ + (1 - τ) θ with τ_k = 1 - (1 - τ_0)(cos(πk/K) + 1)/2,
    parameter by parameter.
    """
    method, total_steps = toy(momentum_start=0.9, total_steps=10), 10
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    average = {name: value.detach().clone() for name, value in method.backbone.named_parameters()}
    average |= {
        f"projector.{name}": value.detach().clone() for name, value in method.projector.named_parameters()
    }
    for step in range(total_steps):
        targets = method.targets(views(step))
        out = method(views(step))
        optimizer.zero_grad()
        method.loss(out, targets).backward()
        optimizer.step()
        method.update_state([(out, targets)], step)
        tau = 1 - (1 - 0.9) * (math.cos(math.pi * step / total_steps) + 1) / 2
        online = dict(method.backbone.named_parameters()) | {
            f"projector.{n}": v for n, v in method.projector.named_parameters()
        }
        average = {name: tau * value + (1 - tau) * online[name].detach() for name, value in average.items()}
    found = dict(method.momentum_backbone.named_parameters()) | {
        f"projector.{n}": v for n, v in method.momentum_projector.named_parameters()
    }
    for name, value in average.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-12, atol=1e-14)
    assert (found["1.weight"] - method.backbone[1].weight).abs().max() > 1e-3


def test_the_momentum_encoder_has_its_own_batch_statistics_and_no_gradient():
    method = toy()
    online_before = method.backbone[2].running_mean.clone()
    momentum_before = method.momentum_backbone[2].running_mean.clone()
    targets = method.targets(views())
    assert not targets.requires_grad and not any(
        p.requires_grad for p in method.momentum_backbone.parameters()
    )
    assert torch.equal(method.backbone[2].running_mean, online_before)
    rows = method.momentum_backbone[1](torch.cat(views()).flatten(1)).detach()
    torch.testing.assert_close(
        method.momentum_backbone[2].running_mean, 0.9 * momentum_before + 0.1 * rows.mean(0)
    )


def test_the_momentum_encoder_leaves_out_no_branch():
    backbone = build_backbone(ModelConfig(stem="small", width=0.125, drop_path=0.5))
    for part in backbone.modules():
        # timm starts the last norm of a branch from 0, and whether such a branch is left out does not show.
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    config = MethodConfig(name="byol", projector_hidden=8, projector_out=4, predictor_hidden=8)
    method = build_method(config, backbone, RunFacts(total_steps=10))
    images = torch.randn(8, 3, 8, 8)
    assert method.training and method.momentum_backbone.training
    assert torch.equal(method.targets([images, images]), method.targets([images, images]))
    assert not torch.equal(method.backbone(images), method.backbone(images))


def test_a_step_past_the_end_of_the_run_is_an_error():
    with pytest.raises(IndexError):
        toy(total_steps=3).update_state([], 3)


def test_the_momentum_schedule_is_not_part_of_the_state():
    assert set(toy(total_steps=3).state_dict()) == set(toy(total_steps=5).state_dict())
