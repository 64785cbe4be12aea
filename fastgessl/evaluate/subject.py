"""What is evaluated: a run of ours, a timm model, or a file of weights."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import timm
from accelerate.utils import set_seed
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgessl.config import Config, ModelConfig, UsageError, ViewsConfig
from fastgessl.models import build_backbone
from fastgessl.runs import read_config

TIMM = "timm:"
METADATA = "fastgessl"


@dataclass(frozen=True)
class Subject:
    """An encoder with everything that is needed to measure it."""

    name: str
    """Its row in the table."""
    encoder: nn.Module
    config: Config
    folder: Path
    """Where results and cached features go: the run's own folder for a run."""

    @property
    def cache(self) -> Path | None:
        """Where features are kept; None if they are not."""
        return self.folder / "features" if self.config.evaluate.cache else None


def base_config(target: str) -> Config:
    """The configuration that options are laid over: a run's own, or one with the model and the views that the
    weights were made for.

    `target`: the folder of a run, timm:NAME, or a .safetensors file. UsageError if it is none of them.
    """
    if target.startswith(TIMM):
        return _timm_config(target.removeprefix(TIMM))
    if target.endswith(".safetensors"):
        return _described_config(Path(target))
    return read_config(target)


def open_subject(target: str, config: Config) -> Subject:
    """The encoder of `target`, as `base_config` takes it, with its weights. UsageError if they are absent or
    do not fit the model.
    """
    if target.startswith(TIMM):
        return Subject(
            target, _timm_encoder(target, config), config, _folder(target.removeprefix(TIMM), config)
        )
    if target.endswith(".safetensors"):
        return Subject(
            Path(target).stem, _with_weights(config, Path(target)), config, _folder(Path(target).stem, config)
        )
    run = Path(target)
    weights = run / "encoder.safetensors"
    if not weights.is_file():
        raise UsageError(
            f"run '{run}' has no encoder.safetensors, so it has not been trained to its end. "
            f"Finish it: fastgessl train {run / 'config.yaml'} --train.run_dir {run} --train.resume auto"
        )
    return Subject("this run", _with_weights(config, weights), config, run)


def untrained_encoder(config: Config) -> nn.Module:
    """The backbone with random weights, which depend on model and seed alone: not with those of
    `model.weights`, which were trained.
    """
    set_seed(config.train.seed)
    return build_backbone(config.model)


def description(config: Config) -> dict[str, str]:
    """What a weights file says of its model and views, as safetensors metadata that `base_config` reads."""
    views = config.views.model_dump(mode="json", include={"size", "mean", "std"})
    return {
        METADATA: json.dumps({"model": config.model.model_dump(mode="json"), "views": views}),
        "format": "pt",
    }


def _folder(name: str, config: Config) -> Path:
    """The folder for what is measured of a model that is no run."""
    folder = config.evaluate.out or Path("runs") / f"evaluate-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"evaluate.out '{folder}' cannot be written ({error.strerror}). Name another folder."
        ) from None
    return folder


def _with_weights(config: Config, path: Path) -> nn.Module:
    """The model of `config` with the weights of a file; a classifier's last layer, which timm files often
    hold, is left out.
    """
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise UsageError(
            f"there is no file '{path}'. Name a .safetensors file, the folder of a run, or timm:NAME."
        ) from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"'{path}' cannot be read as safetensors: {' '.join(str(error).split())}") from None
    return _loaded(untrained_encoder(config), weights, f"'{path}'", config)


def _loaded(backbone: nn.Module, weights: Mapping[str, Tensor], origin: str, config: Config) -> nn.Module:
    classifier = {name for name in weights if name.split(".")[0] in ("fc", "head", "classifier")} - set(
        backbone.state_dict()
    )
    try:
        backbone.load_state_dict({name: value for name, value in weights.items() if name not in classifier})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{origin} does not hold the weights of model.name {config.model.name} (stem "
            f"{config.model.stem}, width "
            f"{config.model.width:g}): {reason}. Say which model it is: --model.name, --model.stem, "
            "--model.width."
        ) from None
    return backbone


def _timm_config(name: str) -> Config:
    model = ModelConfig(name=name)
    build_backbone(model)  # an unknown name is refused here, with the nearest ones
    made_for = timm.get_pretrained_cfg(name)
    views = ViewsConfig()
    if made_for is not None:
        given = {"size": made_for.input_size[-1], "mean": made_for.mean, "std": made_for.std}
        views = ViewsConfig.model_validate(given)
    return Config(recipe=TIMM + name, model=model, views=views)


def _timm_encoder(target: str, config: Config) -> nn.Module:
    weights = config.evaluate.weights
    if weights == "none":
        return untrained_encoder(config)
    if weights != "pretrained":
        return _with_weights(config, Path(weights))
    try:
        pretrained = timm.create_model(target.removeprefix(TIMM), pretrained=True, num_classes=0)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(
            f"the weights of {target} could not be fetched ({reason}). Fetch them where there is a network, "
            "or give a file: "
            "--evaluate.weights FILE.safetensors, or random ones: --evaluate.weights none."
        ) from error
    return _loaded(untrained_encoder(config), pretrained.state_dict(), target, config)


def _described_config(path: Path) -> Config:
    """Model and views as `description` wrote them; the defaults for other files, and for those that turn out
    missing when they are read.
    """
    written = "{}"
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get(METADATA, written)
    try:
        return Config.model_validate({"recipe": path.stem, **json.loads(written)})
    except (ValidationError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"'{path}' describes a model that this version does not know: {reason}. Export it again."
        ) from None
