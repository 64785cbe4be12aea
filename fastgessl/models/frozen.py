"""A further network of timm's that looks at the views and is never trained."""

import re
import warnings
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from torch import nn

from fastgessl.config import UsageError
from fastgessl.models.backbone import build_backbone, load_weights
from fastgessl.runs import read_config

# Parts of timm's names that say how weights came about without labels; "ft" says that labels followed.
LABEL_FREE = ("dino", "dinov2", "dinov3", "mae", "ijepa", "lejepa", "moco", "swav", "mim")


def frozen_network(name: str, weights: str, view_size: int, option: str = "dsa.helper") -> nn.Module:
    """timm's `name`, without classifier, in evaluation mode and without gradient: (B, 3, view_size,
    view_size) -> (B, F).

    `weights` as in `load_weights`; those of a run bring its stem, width and dimension along. Warns if they
    were trained with labels, which would then leak into what is called self-supervised. Raises UsageError for
    a name that timm does not know or that is not the run's, weights that cannot be had, and a network that
    takes no images of this size.

    >>> frozen_network("resnet18", "none", 32)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 512])
    """
    if not timm.is_model(name.split(".")[0]):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UsageError(
            f"{option} '{name}' is neither momentum nor a network that timm knows. Perhaps you meant "
            f"{', '.join(near) or 'momentum'}?"
        )
    network = _network(name, weights, option).eval().requires_grad_(False)
    _check_size(network, name, view_size, option)
    load_weights(network, name, weights, f"{option}_weights")
    if weights != "none" and not label_free(name, weights):
        warnings.warn(
            f"{option} {name}: these weights ({weights}) were trained with labels, as far as can be told. "
            "They leak into a method that is "
            "called self-supervised; say so beside every number, or use --dsa.helper momentum.",
            stacklevel=2,
        )
    return network


def label_free(name: str, weights: str) -> bool:
    """Whether no labels were used, as a run's configuration says, or the name of the weights: timm's tag, or
    a file's own name.

    >>> label_free("vit_small_patch16_224.dino", "pretrained"), label_free("resnet18.a1_in1k", "pretrained")
    (True, False)
    >>> label_free("resnet18", "swav/resnet18_a1.safetensors")
    False
    >>> label_free("resnet50", "labels/resnet50-swav.safetensors")
    True
    """
    if (run := run_of(weights)) is not None:
        config = read_config(run)
        start = config.model.weights
        # One step back and no further: a run that started from another run is taken at its name.
        unlabelled_start = start == "none" or (run_of(start) is None and label_free(config.model.name, start))
        return config.method.name != "supervised" and unlabelled_start
    tag = timm.get_pretrained_cfg(name)
    words = f"{name}.{'' if tag is None else tag.tag}" if weights == "pretrained" else Path(weights).stem
    parts = set(re.split(r"[._-]", words.lower()))
    return "ft" not in parts and any(part in LABEL_FREE for part in parts)


def _network(name: str, weights: str, option: str) -> nn.Module:
    """timm's own network, or the one that the run behind `weights` trained."""
    run = run_of(weights)
    if run is None:
        return timm.create_model(name, pretrained=False, num_classes=0)
    model = read_config(run).model
    if model.name.split(".")[0] != name.split(".")[0]:
        raise UsageError(
            f"{option} {name} is not what the run '{run}' trained, {model.name}. Set --{option} {model.name}."
        )
    return build_backbone(model)


def run_of(weights: str) -> Path | None:
    """The folder of the run that `weights` names, by itself or by its encoder; None if they are no run's."""
    path = Path(weights).expanduser()
    folder = path.parent if path.name == "encoder.safetensors" else path
    return folder if (folder / "config.yaml").is_file() else None


def _check_size(network: nn.Module, name: str, view_size: int, option: str) -> None:
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, view_size, view_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(
            f"{option} {name} does not take views of {view_size} pixels ({reason}). Take a network for that "
            "size, a convolutional one, or "
            "--dsa.helper momentum."
        ) from error
