"""Backbones by timm's name, with what small images need, and the weights that training starts from."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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
        backbone = _resnet(backbone, f"model.stem '{config.stem}'", "'imagenet'", config)
        backbone.conv1 = _convolution(3, backbone.conv1.out_channels, kernel=3, stride=1)
    if config.stem == "small":
        backbone.maxpool = nn.Identity()
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


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """A bias-free convolution with same-size padding, initialised as timm initialises ResNets."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def load_weights(network: nn.Module, name: str, source: str, option: str) -> None:
    """Fill `network`, timm's `name` without classifier, with the weights that `source` names; `option` is how
    the user calls it.

    `source`: none (leave it as it is), pretrained (timm's, fetched once), a .safetensors file, or the folder
    of a finished run. A classifier in the file is left out. Raises UsageError if they cannot be had, or
    belong to another architecture.

    >>> load_weights(nn.Linear(2, 2), "linear", "none", "model.weights")
    """
    if source == "none":
        return
    weights = _pretrained(name, option) if source == "pretrained" else _stored(source, option)
    expected = network.state_dict()
    weights = _without_classifier(weights, name, expected)
    if misfits := _misfits(weights, expected):
        raise UsageError(
            f"{option} '{source}' belongs to another network than this {name}: {misfits}. Set --model.name, "
            "--model.stem, --model.width "
            "and --model.dimension to what these weights were trained with, or name others."
        )
    network.load_state_dict(weights)


def _pretrained(name: str, option: str) -> Mapping[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{option} pretrained: timm's weights of {name} cannot be fetched ({type(error).__name__}: "
            f"{reason}). Without a network, give "
            "a .safetensors file."
        ) from error


def _stored(source: str, option: str) -> Mapping[str, Tensor]:
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise UsageError(
            f"{option} '{source}': there is no "
            f"{'such file' if path == Path(source).expanduser() else path.name + ' in that folder'}. "
            "Give none, pretrained, a .safetensors file, or the folder of a run that has been trained to "
            "its end."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"{option} '{source}' cannot be read as safetensors ({error}). Give another file."
        ) from error


def _without_classifier(
    weights: Mapping[str, Tensor], name: str, expected: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """`weights` less those of timm's classification layers, which published files of `name` hold and an
    encoder lacks.
    """
    known = timm.get_pretrained_cfg(name)
    layers = known.classifier or () if known else ()
    prefixes = tuple(f"{layer}." for layer in ((layers,) if isinstance(layers, str) else layers))
    return {key: value for key, value in weights.items() if key in expected or not key.startswith(prefixes)}


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What does not fit, in a few words; nothing if all fits."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [key for key in expected if key in found and found[key].shape != expected[key].shape]
    findings = [
        f"{len(keys)} {kind} such as {keys[0]}"
        for kind, keys in (("are missing", missing), ("are not known", unexpected))
        if keys
    ]
    if shapes:
        sizes = "x".join(map(str, found[shapes[0]].shape)), "x".join(map(str, expected[shapes[0]].shape))
        findings.append(
            f"{len(shapes)} have another shape such as {shapes[0]}, {sizes[0]} where {sizes[1]} is needed"
        )
    return ", ".join(findings)
