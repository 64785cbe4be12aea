"""Recipes: small YAML parts (a data set, a method, a GeSSL preset) that compose into a named run.

`<data>-<method>[-<backbone>][-<n>ep][-dsa][-gessl[-<preset>]]`, for example
`cifar10-byol-resnet18-gessl-fast`. A part holds a partial configuration under `config`, where its numbers
come from under `source`, and, for a method, what it changes for one data set under `per_data` and for one
backbone under `per_backbone`, which an entry of `per_data` may have too. Later parts win: data, method,
method on this data, method on this data at this length, backbone, method with this backbone, method on this
data with this backbone, length, regulator, preset. A length, `-300ep`, sets the epochs; `per_epochs` has what
was published for it or the next shorter. Twins are never stored.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from fastgessl.config import Config, UsageError, flat
from fastgessl.recipes.yaml_file import read_yaml

DEFAULT_PRESET = "fast"


@dataclass(frozen=True)
class Recipe:
    """A composed configuration, and for each of its dotted keys the reason for its value."""

    config: Config
    sources: Mapping[str, str]


@cache
def parts(kind: str) -> dict[str, dict[str, Any]]:
    """All parts of a kind (`data`, `methods`, `regulators`, `gessl`) by name, sorted."""
    folder = resources.files("fastgessl") / "recipes" / kind
    loaded = {
        Path(file.name).stem: yaml.safe_load(file.read_text())
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    }
    return dict(sorted(loaded.items()))


def names() -> list[str]:
    """Every composable name without a backbone or preset suffix: `<data>-<method>` and
    `<data>-<method>-gessl`.
    """
    plain = [f"{data}-{method}" for data in parts("data") for method in parts("methods")]
    return [name + suffix for name in plain for suffix in ("", "-gessl")]


def backbones(data: str, method: str) -> list[str]:
    """What may follow `<data>-<method>`, the default first. One that some method has numbers of its own for
    goes with those methods only: another optimiser's learning rate is worth nothing to a transformer.

    >>> backbones("imagenet", "dino"), backbones("imagenet", "simclr")
    (['resnet50', 'resnet18', 'vit_small_patch16_224'], ['resnet50', 'resnet18'])
    """
    special = {name for part in parts("methods").values() for name in part.get("per_backbone", {})}
    own = parts("methods")[method].get("per_backbone", {})
    return [name for name in parts("data")[data]["backbones"] if name not in special or name in own]


def load(recipe: str) -> Recipe:
    """A composed name or a YAML file -> Recipe. UsageError for an unknown name, a bad file, or a combination
    that makes no sense.
    """
    if recipe.endswith((".yaml", ".yml")):
        return _from_file(Path(recipe))
    return _from_layers(recipe, _layers(recipe))


def _layers(recipe: str) -> list[tuple[str, dict[str, Any], dict[str, str]]]:
    """The parts that a composed name asks for: (file, config, sources), in the order in which they apply."""
    data_name, _, rest = recipe.partition("-")
    method_name, *suffixes = rest.split("-")
    if data_name not in parts("data") or method_name not in parts("methods"):
        raise UsageError(_unknown_recipe(recipe))
    data, method = parts("data")[data_name], parts("methods")[method_name]
    file = f"recipes/methods/{method_name}.yaml"
    here = method.get("per_data", {}).get(data_name, {})
    layers = [
        _layer(f"recipes/data/{data_name}.yaml", data),
        _layer(file, method),
        _layer(f"{file}, on {data_name}", here),
    ]
    backbone, epochs, regulator, preset = _suffixes(recipe, suffixes)
    if lengths := [length for length in here.get("per_epochs", {}) if length <= epochs]:
        layers.append(
            _layer(f"{file}, on {data_name}, {max(lengths)} epochs", here["per_epochs"][max(lengths)])
        )
    if backbone:
        if backbone not in (offered := backbones(data_name, method_name)):
            raise UsageError(
                f"recipe '{recipe}' asks for the backbone {backbone}, but {data_name}-{method_name} has "
                f"numbers for {', '.join(offered)} "
                f"only. Take one of those, or name another with --model.name and choose its numbers yourself."
            )
        layers.append(("the recipe's name", {"model": {"name": backbone}}, {}))
    named = backbone or {
        key: value for _, config, _ in layers for key, value in config.get("model", {}).items()
    }.get("name", "")
    for part, place in ((method, ""), (here, f" on {data_name}")):
        layers.append(_layer(f"{file}, with {named}{place}", part.get("per_backbone", {}).get(named, {})))
    if epochs:
        layers.append(("the recipe's name", {"train": {"epochs": epochs}}, {}))
    for kind, name in (("regulators", regulator), ("gessl", preset)):
        layers += [_layer(f"recipes/{kind}/{name}.yaml", parts(kind)[name])] if name else []
    return layers


class _Suffixes(NamedTuple):
    """What follows `<data>-<method>`, in any order; empty or 0 where it is not given."""

    backbone: str = ""
    epochs: int = 0
    regulator: str = ""
    preset: str = ""


def _suffixes(recipe: str, suffixes: list[str]) -> _Suffixes:
    known_backbones = {name for part in parts("data").values() for name in part["backbones"]}
    found, remaining = _Suffixes(), list(suffixes)
    while remaining:
        word = remaining.pop(0)
        if word == "gessl" and not found.preset:
            preset = remaining.pop(0) if remaining and remaining[0] in parts("gessl") else DEFAULT_PRESET
            found = found._replace(preset=preset)
        elif word in known_backbones and not found.backbone:
            found = found._replace(backbone=word)
        elif word in parts("regulators") and not found.regulator:
            found = found._replace(regulator=word)
        elif re.fullmatch(r"[1-9]\d{0,5}ep", word) and not found.epochs:
            found = found._replace(epochs=int(word.removesuffix("ep")))
        else:
            known = [*known_backbones, "gessl", *parts("gessl"), *parts("regulators"), "100ep"]
            raise UsageError(_unknown_recipe(recipe, word, known))
    return found


def _unknown_recipe(recipe: str, word: str = "", known: list[str] | None = None) -> str:
    if word:
        near = difflib.get_close_matches(word, known or [], n=3, cutoff=0.4)
        problem = f"recipe '{recipe}' has the unknown part '{word}'."
    else:
        candidates = names() + [
            f"{name}-{preset}" for name in names() if name.endswith("-gessl") for preset in parts("gessl")
        ]
        near = difflib.get_close_matches(recipe, candidates, n=3, cutoff=0.3)
        problem = f"there is no recipe '{recipe}', and it is not a .yaml file."
    meant = f" Perhaps you meant {', '.join(near)}." if near else ""
    return f"{problem}{meant} `fastgessl recipes` lists them all."


def _layer(file: str, part: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, str]]:
    return file, part.get("config", {}), part.get("source", {})


def _from_layers(recipe: str, layers: list[tuple[str, dict[str, Any], dict[str, str]]]) -> Recipe:
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for file, config, source in layers:
        _merge(merged, config)
        for option in flat(config):
            reason = source.get(option) or source.get(option.split(".")[0])
            sources[option] = f"{file}: {reason}" if reason else file
    return Recipe(_validate({"recipe": recipe, **merged}, recipe), sources)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Write `above` over `below`, section into section."""
    for key, value in above.items():
        if isinstance(value, Mapping):
            _merge(below.setdefault(key, {}), value)
        else:
            below[key] = value


def _from_file(path: Path) -> Recipe:
    try:
        loaded = read_yaml(path)
    except FileNotFoundError:
        raise UsageError(
            f"there is no recipe file '{path}'. `fastgessl recipes` lists the names that need no file."
        ) from None
    if not isinstance(loaded, dict):
        raise UsageError(
            f"recipe file '{path}' must hold a mapping of sections such as `train:`, found "
            f"{type(loaded).__name__}."
        )
    config = _validate({"recipe": path.stem, **loaded}, str(path))
    return Recipe(config, dict.fromkeys(flat(loaded), str(path)))


def _validate(values: dict[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{origin}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Pydantic's findings on one line: the option, what is wrong, what was found, and near names for an
    unknown key.
    """
    findings = []
    for finding in error.errors(include_url=False)[:5]:
        location = ".".join(str(word) for word in finding["loc"])[:100]
        if finding["type"] == "extra_forbidden":
            findings.append(unknown_option(location))
        elif finding["type"] == "value_error":
            findings.append(finding["msg"].removeprefix("Value error, "))
        else:
            problem = finding["msg"][0].lower() + finding["msg"][1:]
            findings.append(f"{_option_in(location)}: {problem}, found {finding['input']!r:.200}.")
    return " ".join(dict.fromkeys(findings))


def unknown_option(name: str) -> str:
    """What to say of an option that does not exist, with near names.

    >>> unknown_option("--data.enigne")
    "unknown option '--data.enigne'. Perhaps you meant --data.engine, --data.name."
    """
    dashes = "--" if name.startswith("--") else ""
    known = Config().options() if dashes else dotted_keys()
    near = difflib.get_close_matches(name.removeprefix("--"), known, n=3, cutoff=0.6)
    meant = f" Perhaps you meant {', '.join(dashes + key for key in near)}." if near else ""
    return f"unknown option '{name}'.{meant}"


def _option_in(location: str) -> str:
    """The option that pydantic's location begins with; a place in a list or a union's member may follow."""
    while location not in dotted_keys() and "." in location:
        location = location.rpartition(".")[0]
    return location


def dotted_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every option by its dotted name, such as `method.moco.symmetric`, and the sections themselves."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys
