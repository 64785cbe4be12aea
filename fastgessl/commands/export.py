"""The trained encoder for other programs: safetensors, torchvision's or timm's names, or a folder as the
model hub has it. No pickle.

Every export is a folder with `model.safetensors`, and `load.py`, which builds the network with nothing but
timm (or torchvision) and loads the weights: what to read for those who want to do it themselves.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import timm
import torchvision
from safetensors.torch import load_file, save_file
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastgessl.config import Config, UsageError
from fastgessl.evaluate.subject import description
from fastgessl.models import build_backbone, dimension
from fastgessl.models.dimension import Widening
from fastgessl.recipes import Parser
from fastgessl.runs import read_config, write_bytes, write_json

KINDS = ("safetensors", "torchvision", "timm", "hub-folder")
# A vision transformer was trained on views of some size, and takes others, as in `build_backbone`.
_ANY_SIZE = {"dynamic_img_size": True}


def main(words: list[str]) -> None:
    """Run the command. UsageError for what cannot be done."""
    parser = Parser(program="export", description="Write a run's encoder for timm, torchvision or the hub.")
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--to", required=True, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--out", type=Path, help="folder to write (default: export-KIND in the run's folder)")
    given = parser.parse_args(words)
    print(export_run(given.run, given.to, given.out))


def export_run(run: str | Path, kind: str, out: Path | None = None) -> Path:
    """Write the encoder of a finished run as `kind` into the folder `out` (`<run>/export-<kind>` if none is
    given); returns it.

    UsageError for an unknown kind, a run without weights, or a network that torchvision does not have.
    """
    if kind not in KINDS:
        raise UsageError(f"--to '{kind}' is unknown. Choose {', '.join(KINDS)}.")
    run = Path(run)
    config = read_config(run)
    source = run / "encoder.safetensors"
    if not source.is_file():
        raise UsageError(
            f"run '{run}' has no encoder.safetensors, so it has not been trained to its end. There is "
            "nothing to export."
        )
    weights = load_file(source)
    # What the folder holds must load: the weights are tried on the network before anything is written.
    backbone = build_backbone(config.model)
    backbone.load_state_dict(weights)
    code = _torchvision_code(config, backbone) if kind == "torchvision" else _timm_code(config, backbone)
    folder = out or run / f"export-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, folder / "model.safetensors", config)
    write_bytes(folder / "load.py", code.encode())
    if kind == "hub-folder":
        write_json(folder / "config.json", hub_config(config, backbone))
        write_bytes(folder / "README.md", _card(config, backbone).encode())
    return folder


def _write_weights(weights: dict[str, Tensor], path: Path, config: Config) -> None:
    temporary = path.with_name(path.name + ".part")
    save_file({name: value.contiguous() for name, value in weights.items()}, temporary, description(config))
    temporary.replace(path)


def hub_config(config: Config, backbone: nn.Module) -> dict[str, object]:
    """config.json as timm reads it from a hub or `local-dir:` folder."""
    views = config.views
    made_for = {"input_size": [3, views.size, views.size], "mean": list(views.mean), "std": list(views.std)}
    options: dict[str, object] = {"model_args": _ANY_SIZE} if isinstance(backbone, VisionTransformer) else {}
    return {
        "architecture": config.model.name.split(".")[0],
        **options,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "pretrained_cfg": {**made_for, "num_classes": 0, "fixed_input_size": False},
    }


def _timm_code(config: Config, backbone: nn.Module) -> str:
    """load.py with timm alone: timm's own network, or the changes to it that stem and width stand for,
    written out.
    """
    lines = [
        '"""Load the encoder with timm: `from load import load; encoder = load()`, (B, 3, S, S) -> '
        '(B, F)."""',
        "",
    ]
    lines += [
        "from pathlib import Path",
        "",
        "import timm",
        "import torch",
        "from safetensors.torch import load_file",
        "",
    ]
    lines += _widening_classes(backbone)
    options: dict[str, Any] = {"num_classes": 0} | (
        _ANY_SIZE if isinstance(backbone, VisionTransformer) else {}
    )
    if isinstance(backbone, ResNet) and config.model.width != 1:
        options["channels"] = _stage_channels(backbone)
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    lines += [
        "def load() -> torch.nn.Module:",
        f"    encoder = timm.create_model({config.model.name!r}, {arguments})",
    ]
    lines += [
        f"    {line}" for line in _changed_layers(backbone, timm.create_model(config.model.name, **options))
    ]
    lines += _widened(backbone)
    lines += [
        '    encoder.load_state_dict(load_file(Path(__file__).with_name("model.safetensors")))',
        "    return encoder.eval()",
    ]
    return "\n".join(lines) + "\n" + _preprocessing(config)


def _torchvision_code(config: Config, backbone: nn.Module) -> str:
    """load.py with torchvision alone. Its ResNets share timm's names of weights."""
    name = config.model.name.split(".")[0]
    theirs = getattr(torchvision.models, name, None)
    if not isinstance(backbone, ResNet) or theirs is None or config.model.width != 1:
        raise UsageError(
            f"torchvision has no {name} of width {config.model.width:g} with these weights' names: its "
            "ResNets of width 1 can be written "
            "so. Use --to timm."
        )
    lines = [
        '"""Load the encoder with torchvision: `from load import load; encoder = load()`, (B, 3, S, S) -> '
        '(B, F)."""',
        "",
    ]
    lines += [
        "from pathlib import Path",
        "",
        "import torch",
        "import torchvision",
        "from safetensors.torch import load_file",
        "",
    ]
    lines += _widening_classes(backbone)
    lines += [
        "def load() -> torch.nn.Module:",
        f"    encoder = torchvision.models.{name}()",
        "    encoder.fc = torch.nn.Identity()",
    ]
    other = theirs()
    other.fc = nn.Identity()
    lines += [f"    {line}" for line in _changed_layers(backbone, other)]
    lines += _widened(backbone)
    lines += [
        '    encoder.load_state_dict(load_file(Path(__file__).with_name("model.safetensors")))',
        "    return encoder.eval()",
    ]
    return "\n".join(lines) + "\n" + _preprocessing(config)


def _plain(config: Config, backbone: nn.Module) -> bool:
    """Whether timm's own network of that name takes the weights."""
    return config.model.stem == "imagenet" and config.model.width == 1 and not _widenings(backbone)


def _widenings(backbone: nn.Module) -> list[Widening]:
    return [module for module in backbone.modules() if isinstance(module, Widening)]


def _widening_classes(backbone: nn.Module) -> list[str]:
    """What neither library has: the source of the widening, if the encoder has one, and the blank line before
    what follows.
    """
    if not _widenings(backbone):
        return [""]
    return [
        "from torch import Tensor, nn",
        "",
        "",
        inspect.getsource(dimension.convolution),
        "",
        inspect.getsource(Widening),
        "",
    ]


def _widened(backbone: nn.Module) -> list[str]:
    """The line of load.py that appends it, as `models.dimension.widen` does."""
    shapes = [
        (wide.layers[0].in_channels, wide.layers[0].out_channels, wide.layers[-1].num_features)
        for wide in _widenings(backbone)
    ]
    return [f"    encoder.layer4.append(Widening{shape})" for shape in shapes]


def _stage_channels(backbone: Any) -> tuple[int, ...]:
    """timm's `channels` of a ResNet: the width of each stage before its blocks expand it."""
    return tuple(stage["num_chs"] // backbone.layer1[0].expansion for stage in backbone.feature_info[1:])


def _changed_layers(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Assignments that turn `theirs` into `ours` where stem and width changed a convolution, a norm or the
    pooling.
    """
    lines = []
    own = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        replacement, target = own.get(name), _as_attribute(name)
        if name.endswith(".downsample") and replacement is None:
            lines.append(f"encoder.{target} = None")
        if isinstance(replacement, nn.Conv2d) and _convolution(replacement) != _convolution(module):
            lines.append(f"encoder.{target} = torch.nn.{_convolution(replacement)}")
        elif isinstance(replacement, nn.BatchNorm2d) and replacement.num_features != getattr(
            module, "num_features", None
        ):
            lines.append(f"encoder.{target} = type(encoder.{target})({replacement.num_features})")
        elif isinstance(replacement, nn.Identity) and not isinstance(module, nn.Identity):
            lines.append(f"encoder.{target} = torch.nn.Identity()")
    return lines


def _as_attribute(name: str) -> str:
    """layer1.0.conv1 -> layer1[0].conv1."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".")).removeprefix(
        "."
    )


def _convolution(module: nn.Module) -> str:
    if not isinstance(module, nn.Conv2d):
        return ""
    channels = f"{module.in_channels}, {module.out_channels}"
    shape = f"{module.kernel_size}, {module.stride}, {module.padding}"
    return f"Conv2d({channels}, {shape}, bias={module.bias is not None})"


def _preprocessing(config: Config) -> str:
    views = config.views
    return (
        f"\n\n# Pixels in [0, 1], {views.size} x {views.size}, (pixels - MEAN) / STD for each channel.\n"
        f"SIZE = {views.size}\nMEAN = {views.mean}\nSTD = {views.std}\n"
    )


def _card(config: Config, backbone: nn.Module) -> str:
    plain = _plain(config, backbone)
    usage = (
        'import timm\n\nencoder = timm.create_model("local-dir:path/to/this/folder", pretrained=True, '
        "num_classes=0).eval()"
        if plain
        else "from load import load  # in this folder; needs timm and safetensors\n\nencoder = load()"
    )
    views = config.views
    return (
        f"---\nlibrary_name: timm\ntags: [feature-extraction, self-supervised]\n---\n\n# {config.recipe}\n\n"
        f"{config.model.name} (stem {config.model.stem}, width {config.model.width:g}), "
        f"{backbone.num_features} features, trained without "
        f"labels by {config.method.name} on {config.data.name} for {config.train.epochs} "
        f"epochs.\n\n```python\n{usage}\n```\n\n"
        f"Images: {views.size} x {views.size}, means {list(views.mean)}, deviations {list(views.std)} of "
        "pixels in [0, 1].\n"
    )
