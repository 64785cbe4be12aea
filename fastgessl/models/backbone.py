"""Backbones by timm's name, with what small images need, a small stem and a narrower network, and a wider
representation if asked for.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastgessl.config import ModelConfig, UsageError
from fastgessl.models.dimension import widen


def build_backbone(config: ModelConfig) -> nn.Module:
    """A randomly initialised timm network without classifier: (B, 3, S, S) -> (B, F), with F as
    `.num_features`.

    `stem="small"` gives a ResNet a 3x3 stride-1 first convolution (padding 1) and no max-pooling, "medium"
    the convolution alone; `width` multiplies its channels, the stem's included; `dimension` is the F to reach
    through a bottleneck. Raises UsageError for an unknown name (with the nearest ones) and where stem, width,
    dimension or drop_path do not apply.

    >>> backbone = build_backbone(ModelConfig(name="resnet18", stem="small", width=0.25))
    >>> backbone.num_features, tuple(backbone.conv1.weight.shape)
    (128, (16, 3, 3, 3))
    """
    if not timm.is_model(config.name):
        near = get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.4)
        raise UsageError(
            f"model.name '{config.name}' is no backbone that timm knows. Perhaps you meant "
            f"{', '.join(near) or 'resnet18'}?"
        )
    backbone = _created(config)
    if config.width != 1:
        backbone = _scaled(_resnet(backbone, f"model.width {config.width:g}", "1", config), config)
    if config.stem != "imagenet":
        _shrink_stem(
            _resnet(backbone, f"model.stem '{config.stem}'", "'imagenet'", config),
            pool=config.stem == "medium",
        )
    if config.dimension is not None and config.dimension != backbone.num_features:
        instead = f"{backbone.num_features}, its own width,"
        widen(
            _resnet(backbone, f"model.dimension {config.dimension}", instead, config),
            config.dimension_bottleneck,
            config.dimension,
        )
    # Some families (mobilenetv3) end in a further layer, and num_features is then not the width of what they
    # return.
    backbone.num_features = getattr(backbone, "head_hidden_size", backbone.num_features)
    return backbone


def _created(config: ModelConfig) -> Any:
    """timm's network. A vision transformer takes views of any size that its patches divide, by interpolated
    position embeddings.
    """
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    try:
        backbone = timm.create_model(config.name, num_classes=0, **options)
    except TypeError:
        raise UsageError(
            f"'{config.name}' has no stochastic depth. Set --model.drop_path 0, or take another model.name."
        ) from None
    if isinstance(backbone, VisionTransformer):
        backbone = timm.create_model(config.name, num_classes=0, dynamic_img_size=True, **options)
    return backbone


def _resnet(backbone: nn.Module, option: str, instead: str, config: ModelConfig) -> Any:
    """The backbone, if it is a ResNet whose stem is one convolution."""
    if isinstance(backbone, ResNet) and isinstance(backbone.conv1, nn.Conv2d):
        return backbone
    raise UsageError(
        f"{option} needs a ResNet whose stem is a single convolution (resnet18, resnet34, resnet50, "
        "wide_resnet50_2 ...), and "
        f"'{config.name}' is {type(backbone).__name__}. Use {instead} or another model.name."
    )


def _scaled(original: Any, config: ModelConfig) -> Any:
    """The same ResNet with all channels multiplied. timm scales the stages; its stem has 64, so stem and
    first block are rebuilt.
    """
    expansion = original.layer1[0].expansion
    channels = tuple(
        max(1, round(stage["num_chs"] // expansion * config.width)) for stage in original.feature_info[1:]
    )
    scaled: Any = timm.create_model(
        config.name, num_classes=0, channels=channels, drop_path_rate=config.drop_path
    )
    stem = max(1, round(original.conv1.out_channels * config.width))
    scaled.conv1 = _convolution(3, stem, kernel=7, stride=2)
    scaled.bn1 = type(scaled.bn1)(stem)
    first = scaled.layer1[0]
    first.conv1 = _convolution(stem, first.conv1.out_channels, kernel=first.conv1.kernel_size[0], stride=1)
    if first.downsample is not None:
        outputs = first.downsample[0].out_channels
        first.downsample[0] = _convolution(stem, outputs, kernel=1, stride=1)
        if original.layer1[0].downsample is None and stem == outputs:
            first.downsample = None
    return scaled


def _shrink_stem(backbone: Any, *, pool: bool) -> None:
    backbone.conv1 = _convolution(3, backbone.conv1.out_channels, kernel=3, stride=1)
    if not pool:
        backbone.maxpool = nn.Identity()


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """A bias-free convolution with same-size padding, initialised as timm initialises ResNets."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
