"""Weights that training starts from: timm's, a .safetensors file, or those of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgessl.config import UsageError


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
