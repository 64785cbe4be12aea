import pytest
import timm
import torch
from torch import nn
from toys import assert_same_loss, logits, toy_backbone, toy_images, toy_method, unit

from fastgessl.methods import Outputs, RunFacts


def toy(backbone=None, **options):
    return toy_method("mocov3", RunFacts(total_steps=10), backbone or toy_backbone(norm=True), **options)


def outputs_and_keys(crops=2):
    torch.manual_seed(0)
    predictions = torch.randn(crops, 7, 4, dtype=torch.float64, requires_grad=True)
    return Outputs(predictions, predictions, predictions), unit(torch.randn(2, 7, 4, dtype=torch.float64))


def contrast(queries, keys, temperature):
    """Chen, Xie and He 2021, algorithm 1, ctr(q, k), one row at a time: 2τ times the cross-entropy of row n's
    own key among all keys.
    """
    rows = []
    for n, query in enumerate(unit(queries)):
        weights = [torch.exp(query @ key / temperature) for key in keys]
        rows.append(-torch.log(weights[n] / sum(weights)))
    return 2 * temperature * torch.stack(rows).mean()


@pytest.mark.parametrize("crops", [2, 4])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_v3_s_loss_and_gradient_are_algorithm_1_and_smaller_views_join_the_other_query_of_a_key(
    temperature, crops
):
    out, keys = outputs_and_keys(crops)
    expected = sum(
        contrast(out.predictions[query], keys[keyed], temperature) / (crops - 1)
        for keyed in (0, 1)
        for query in range(crops)
        if query != keyed
    )
    assert_same_loss(toy(temperature=temperature).loss(out, keys), expected, [out.predictions])


def test_moco_v3_s_pi_is_the_softmax_of_predictions_over_the_other_view_s_momentum_projections():
    out, keys = outputs_and_keys()
    for view, pi in enumerate(toy(temperature=0.3).similarity(out, keys)):
        torch.testing.assert_close(logits(pi), unit(out.predictions[view]) @ keys[1 - view].T / 0.3)


def test_keys_are_the_unit_projections_of_the_momentum_encoder_without_gradient():
    method, crops = toy(), toy_images(views=3)
    for parameter in method.momentum_projector.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    keys = method.targets(crops)
    expected = unit(method.momentum_projector(method.momentum_backbone(torch.cat(crops[:2])))).unflatten(
        0, (2, 5)
    )
    torch.testing.assert_close(keys, expected.detach())
    assert not keys.requires_grad


def test_a_convolutional_encoder_has_a_norm_without_weights_behind_the_projector_alone():
    method = toy()
    assert [type(layer).__name__ for layer in method.projector] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    assert [type(layer).__name__ for layer in method.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert not method.projector[-1].affine
    assert all(
        layer.bias is None
        for head in (method.projector, method.predictor)
        for layer in head
        if isinstance(layer, nn.Linear)
    )


def test_a_vision_transformer_keeps_its_random_patch_embedding_and_has_the_deeper_heads():
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32)
    patches = backbone.patch_embed.proj.weight.detach().double().clone()
    method = toy(backbone=backbone)
    linear = [
        sum(isinstance(layer, nn.Linear) for layer in head) for head in (method.projector, method.predictor)
    ]
    assert linear == [3, 2] and not method.predictor[-1].affine
    pair = [torch.randn(4, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    targets = method.targets(pair)
    method.loss(method(pair), targets).backward()
    optimizer.step()
    assert torch.equal(method.backbone.patch_embed.proj.weight, patches)
    assert method.backbone.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
