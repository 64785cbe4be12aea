"""The trained encoder for other programs: safetensors, torchvision's or timm's names, or a folder as the
model hub has it. No pickle.

Every export is a folder with `model.safetensors`, `config.json`, which describes the network, and `load.py`,
which builds it with nothing but timm (or torchvision) and loads the weights.
"""

from pathlib import Path
from typing import Any

import timm
import torchvision
from safetensors.torch import save
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastgessl.commands import export_loader
from fastgessl.config import Config, UsageError
from fastgessl.evaluate.subject import description, open_subject
from fastgessl.models import dimension
from fastgessl.models.dimension import Widening
from fastgessl.recipes import Parser
from fastgessl.runs import read_config, write_bytes, write_json

KINDS = ("safetensors", "torchvision", "timm", "hub-folder")


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
    config = read_config(run)
    backbone = open_subject(str(run), config).encoder
    described = describe(config, backbone, "torchvision" if kind == "torchvision" else "timm")
    folder = out or Path(run) / f"export-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "model.safetensors", save(backbone.state_dict(), description(config)))
    write_json(folder / "config.json", described)
    write_bytes(folder / "load.py", Path(export_loader.__file__).read_bytes())
    if described["widening"]:
        write_bytes(folder / "widening.py", Path(dimension.__file__).read_bytes())
    if kind == "hub-folder":
        write_bytes(folder / "README.md", _card(config, described).encode())
    return folder


def describe(config: Config, backbone: nn.Module, library: str) -> dict[str, Any]:
    """config.json: the network as `load.py` builds it, in the form that timm reads from a hub or `local-dir:`
    folder.
    """
    name = config.model.name.split(".")[0]
    options: dict[str, Any] = {}
    if library == "torchvision":
        theirs = getattr(torchvision.models, name, None)
        if not isinstance(backbone, ResNet) or theirs is None or config.model.width != 1:
            raise UsageError(
                f"torchvision has no {name} of width {config.model.width:g} with these weights' names: its "
                "ResNets of width 1 can be written so. Use --to timm."
            )
        original = theirs()
    else:
        if isinstance(backbone, VisionTransformer):
            options["dynamic_img_size"] = True
        if isinstance(backbone, ResNet) and config.model.width != 1:
            # The width of each stage before its blocks expand it.
            first: Any = backbone.get_submodule("layer1.0")
            expansion = first.expansion
            options["channels"] = [stage["num_chs"] // expansion for stage in backbone.feature_info[1:]]
        original = timm.create_model(name, num_classes=0, **options)
    widenings = [module.layers for module in backbone.modules() if isinstance(module, Widening)]
    views = config.views
    return {
        "library": library,
        "architecture": name,
        "model_args": options,
        "changed_layers": changed_layers(backbone, original),
        "widening": [
            size
            for layers in widenings
            for size in (layers[0].in_channels, layers[0].out_channels, layers[-1].num_features)
        ],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "pretrained_cfg": {
            "input_size": [3, views.size, views.size],
            "mean": list(views.mean),
            "std": list(views.std),
            "num_classes": 0,
            "fixed_input_size": False,
        },
    }


def changed_layers(ours: nn.Module, theirs: nn.Module) -> dict[str, Any]:
    """Where stem and width changed a convolution, a norm or the pooling of `theirs`: name of the layer -> its
    class and arguments, or None if it is gone.
    """
    changed: dict[str, Any] = {}
    own = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        layer = own.get(name)
        if name.endswith(".downsample") and layer is None:
            changed[name] = None
        elif isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Identity) and _told(layer) != _told(module):
            changed[name] = _told(layer)
    return changed


def _told(layer: nn.Module) -> list[Any]:
    """The class and the arguments of a layer."""
    arguments: dict[str, Any] = {}
    if isinstance(layer, nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        arguments = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
    elif isinstance(layer, nn.BatchNorm2d):
        arguments = {"num_features": layer.num_features}
    return [type(layer).__name__, arguments]


def _card(config: Config, described: dict[str, Any]) -> str:
    usage = "from load import load  # in this folder; needs timm and safetensors\n\nencoder = load()"
    if not described["changed_layers"] and not described["widening"]:
        usage = (
            'import timm\n\nencoder = timm.create_model("local-dir:path/to/this/folder", pretrained=True, '
            "num_classes=0).eval()"
        )
    model, views = config.model, config.views
    return (
        f"---\nlibrary_name: timm\ntags: [feature-extraction, self-supervised]\n---\n\n# {config.recipe}\n\n"
        f"{model.name} (stem {model.stem}, width {model.width:g}), {described['num_features']} features, "
        f"trained without labels by {config.method.name} on {config.data.name} for {config.train.epochs} "
        f"epochs.\n\n```python\n{usage}\n```\n\n"
        f"Images: {views.size} x {views.size}, means {list(views.mean)}, deviations {list(views.std)} of "
        "pixels in [0, 1].\n"
    )
