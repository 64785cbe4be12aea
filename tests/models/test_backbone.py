import pytest
import torch

from fastgessl.config import ModelConfig, UsageError
from fastgessl.models import build_backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv3_small_050", "test_vit"])
def test_num_features_is_the_width_of_what_the_backbone_returns(name):
    backbone = build_backbone(ModelConfig(name=name)).eval()
    side = 160 if name == "test_vit" else 64
    assert backbone(torch.zeros(2, 3, side, side)).shape == (2, backbone.num_features)


def test_the_small_stem_keeps_the_resolution_that_the_imagenet_stem_quarters():
    images, sizes = torch.zeros(1, 3, 32, 32), {}
    for stem in ("imagenet", "small"):
        backbone = build_backbone(ModelConfig(stem=stem)).eval()
        sizes[stem] = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(images)))).shape[-1]
    assert sizes == {"imagenet": 8, "small": 32}


def test_the_small_stem_is_a_3x3_convolution_with_kaiming_fan_out_weights():
    torch.manual_seed(0)
    convolution = build_backbone(ModelConfig(name="resnet18", stem="small")).conv1
    assert (convolution.kernel_size, convolution.stride, convolution.padding, convolution.bias) == (
        (3, 3),
        (1, 1),
        (1, 1),
        None,
    )
    assert convolution.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 0.25), ("resnet18", 2.0), ("resnet50", 0.5)])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_the_width_multiplies_every_channel_count_and_changes_nothing_else(name, width, stem):
    narrow, full = (build_backbone(ModelConfig(name=name, stem=stem, width=w)) for w in (width, 1.0))
    shapes, expected = (
        {key: value.shape for key, value in net.state_dict().items()} for net in (narrow, full)
    )
    assert shapes.keys() == expected.keys()
    for key, shape in expected.items():
        scaled = [n if axis > 1 or n == 3 else round(n * width) for axis, n in enumerate(shape)]
        assert list(shapes[key]) == scaled, key
    assert narrow.num_features == round(full.num_features * width)
    assert narrow.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, narrow.num_features)


def test_the_same_seed_gives_the_same_weights():
    torch.manual_seed(4)
    first = build_backbone(ModelConfig(stem="small", width=0.25)).state_dict()
    torch.manual_seed(4)
    second = build_backbone(ModelConfig(stem="small", width=0.25)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "resnet81"}, r"'resnet81' is no backbone that timm knows. Perhaps you meant .*resnet18"),
        (
            {"name": "vit_tiny_patch16_224", "stem": "small"},
            r"model.stem 'small' needs a ResNet .* is VisionTransformer. Use 'imagenet'",
        ),
        (
            {"name": "resnet50d", "width": 0.5},
            r"model.width 0.5 needs a ResNet whose stem is a single convolution",
        ),
    ],
)
def test_what_timm_does_not_know_or_cannot_change_is_refused(options, says):
    with pytest.raises(UsageError, match=says):
        build_backbone(ModelConfig(**options))
