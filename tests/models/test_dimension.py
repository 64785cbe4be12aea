import pytest
import torch

from fastgessl.config import ModelConfig, UsageError
from fastgessl.models import build_backbone
from fastgessl.models.dimension import Widening


@pytest.mark.parametrize(("name", "own", "wide"), [("resnet18", 512, 2048), ("resnet50", 2048, 3000)])
def test_the_representation_has_the_width_that_is_asked_for(name, own, wide):
    plain, widened = (
        build_backbone(ModelConfig(name=name, stem="small", dimension=width)) for width in (None, wide)
    )
    rows = torch.randn(2, 3, 16, 16)
    assert plain(rows).shape[1] == plain.num_features == own
    features = widened(rows)
    assert features.shape[1] == widened.num_features == wide and features.min() >= 0


def test_a_width_that_is_the_backbone_s_own_changes_nothing():
    plain, asked = (build_backbone(ModelConfig(dimension=width)).state_dict().keys() for width in (None, 512))
    assert plain == asked


def test_a_bottleneck_keeps_the_further_parameters_few():
    widening = Widening(512, 512, 8192)
    assert sum(p.numel() for p in widening.parameters()) < 0.2 * (512 * 8192 * 9)


def test_a_multiple_of_the_width_starts_from_the_representation_itself():
    widening = Widening(4, 2, 8)
    for convolution in widening.layers:
        if isinstance(convolution, torch.nn.Conv2d):
            torch.nn.init.zeros_(convolution.weight)
    maps = torch.rand(2, 4, 3, 3)
    torch.testing.assert_close(widening(maps), torch.cat([maps, maps], dim=1))


def test_a_wider_network_that_is_no_resnet_is_refused():
    with pytest.raises(
        UsageError, match=r"model.dimension 1024 needs a ResNet .* Use 192, its own width, or another"
    ):
        build_backbone(ModelConfig(name="vit_tiny_patch16_224", dimension=1024))


def test_a_medium_stem_keeps_the_pooling():
    small, medium = (build_backbone(ModelConfig(stem=stem, width=0.125)) for stem in ("small", "medium"))
    assert small.conv1.weight.shape == medium.conv1.weight.shape == (8, 3, 3, 3)
    rows = torch.zeros(1, 3, 32, 32)
    assert small.forward_features(rows).shape[-1] == 4 and medium.forward_features(rows).shape[-1] == 2
