"""Load the encoder beside this file: `from load import load; encoder = load()` maps (B, 3, S, S) to (B, F).

Needs torch, safetensors, and timm or torchvision, whichever config.json names; nothing else. Images are
S x S, their pixels in [0, 1], then (pixels - mean) / std for each channel: size, mean and std are in
config.json under `pretrained_cfg`. `fastgessl export` copies this file as load.py.
"""

import json
import runpy
from pathlib import Path

import safetensors.torch
import torch


def load(folder: Path = Path(__file__).parent) -> torch.nn.Module:
    """The network that config.json describes with the weights of model.safetensors, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    if config["library"] == "timm":
        import timm

        encoder = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    else:
        import torchvision

        encoder = getattr(torchvision.models, config["architecture"])()
    # What a small stem or a width changes: name of a layer -> its class in torch.nn and arguments, or null.
    for name, layer in config["changed_layers"].items():
        parent, _, own = name.rpartition(".")
        module = layer and getattr(torch.nn, layer[0])(**layer[1])
        setattr(encoder.get_submodule(parent), own, module)
    if config["widening"]:
        widening = runpy.run_path(str(folder / "widening.py"))["Widening"]
        encoder.get_submodule("layer4").append(widening(*config["widening"]))  # type: ignore[operator]
    encoder.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return encoder.eval()
