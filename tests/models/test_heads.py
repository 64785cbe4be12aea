import pytest
import torch
from torch import nn

from fastgessl.models import BottleneckHead, Projector, apply_head, encode


def test_the_projector_is_linear_batch_norm_relu_linear():
    torch.manual_seed(0)
    head, rows = Projector(6, 10, 4), torch.randn(5, 6)
    hidden = rows @ head[0].weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(rows), hidden.clamp_min(0) @ head[3].weight.T + head[3].bias)


def test_simclr_s_output_norm_standardises_the_projections():
    out = Projector(6, 10, 4, output_norm=True)(torch.randn(64, 6))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("head", "biases"),
    [(Projector(6, 10, 4), 1), (Projector(6, 10, 4, output_norm=True), 0), (Projector(4, 10, 4), 1)],
)
def test_no_linear_layer_in_front_of_a_batch_norm_has_a_bias(head, biases):
    assert sum(layer.bias is not None for layer in head if isinstance(layer, nn.Linear)) == biases


@pytest.mark.parametrize("norm", [False, True])
def test_a_bottleneck_head_starts_from_a_normal_distribution_of_deviation_0_02_and_no_biases(norm):
    torch.manual_seed(0)
    layers = [layer for layer in BottleneckHead(200, 300, 100, norm=norm) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [
        (200, 300),
        (300, 300),
        (300, 100),
    ]
    for layer in layers:
        assert layer.weight.mean().abs() < 1e-3 and layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        # A uniform distribution has nothing beyond 1.7 deviations.
        assert (layer.weight.abs() > 0.04).float().mean().item() == pytest.approx(0.0455, rel=0.1)
        assert not layer.bias.any()


def test_views_of_one_size_share_a_forward_and_its_batch_norm():
    torch.manual_seed(0)
    views = [torch.randn(4, 3, 2, 2), 1 + torch.randn(4, 3, 2, 2)]
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    features = encode(norm, views)
    torch.testing.assert_close(features, norm(torch.cat(views)).view(2, 4, 12))
    assert features.mean((0, 1)).abs().max() < 1e-5 < features[0].mean(0).abs().max()


def test_views_of_different_sizes_are_encoded_in_order():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sizes = [4, 4, 2, 2, 2]
    views = [torch.full((3, 3, side, side), float(index)) for index, side in enumerate(sizes)]
    assert encode(pool, views)[:, :, 0].tolist() == [[float(index)] * 3 for index in range(5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_returns_at_least_float32(dtype):
    assert apply_head(nn.Identity(), torch.zeros(2, 3, 4, dtype=dtype)).dtype == torch.float32
    assert apply_head(nn.Identity(), torch.zeros(2, 3, 4, dtype=torch.float64)).dtype == torch.float64
