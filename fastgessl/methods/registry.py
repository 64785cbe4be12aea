"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Literal

from torch import nn

from fastgessl.config import MethodConfig, UsageError
from fastgessl.methods.base import Method

METHODS: dict[str, type[Method]] = {}
"""Every registered method, by the name that `MethodConfig.name` gives it."""


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that files a method under `name`. Raises ValueError if the name is taken."""

    def add(method: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"method '{name}' is registered already, by {METHODS[name].__name__}; {method.__name__} needs another name.")
        METHODS[name] = method
        return method

    return add


def build_method(config: MethodConfig, backbone: nn.Module, *, total_steps: int, negatives: Literal["local", "global"]) -> Method:
    """The method that `config.name` names, over `backbone`: a module (B, 3, S, S) -> (B, F) with the width F as `.num_features`.

    `total_steps` is the length of the run in optimiser steps, for schedules of the method's own (BYOL's momentum). `negatives` says
    whose images a contrastive loss compares with: this rank's, or all ranks'. Raises UsageError for an unknown name.

    >>> from fastgessl.config import ModelConfig
    >>> from fastgessl.models import build_backbone
    >>> backbone = build_backbone(ModelConfig(stem="small", width=0.25))
    >>> type(build_method(MethodConfig(name="simclr"), backbone, total_steps=100, negatives="local")).__name__
    'SimCLR'
    """
    if config.name not in METHODS:
        near = get_close_matches(config.name, METHODS, n=3, cutoff=0.3) or sorted(METHODS)
        raise UsageError(f"method.name '{config.name}' is no method that is known. Perhaps you meant {' or '.join(near)}?")
    return METHODS[config.name](config, backbone, total_steps=total_steps, negatives=negatives)
