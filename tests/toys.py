"""Methods small enough for float64, finite differences and formulas written out."""

from typing import Any

import torch
from torch import nn

from fastgessl.config import MethodConfig
from fastgessl.methods import Method, RunFacts, build_method


def toy_backbone(norm: bool = False) -> nn.Module:
    """(B, 3, 2, 2) -> (B, 6): a linear layer, and a batch norm if asked for."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), *([nn.BatchNorm1d(6)] if norm else []))
    backbone.num_features = 6
    return backbone


def method_config(name: str, **options: Any) -> MethodConfig:
    """Narrow heads. Options of the method alone go to the section of its name."""
    given = {"name": name, "projector_hidden": 8, "projector_out": 4, "predictor_hidden": 8}
    own = type(getattr(MethodConfig(), name)).model_fields if name in MethodConfig.model_fields else {}
    given |= {key: value for key, value in options.items() if key not in own}
    section = {key: value for key, value in options.items() if key in own}
    return MethodConfig.model_validate(given | ({name: section} if section else {}))


def toy_method(
    name: str, facts: RunFacts | None = None, backbone: nn.Module | None = None, **options: Any
) -> Method:
    """The method in float64, over a linear backbone unless another is given, alike at every call."""
    torch.manual_seed(0)
    made = build_method(
        method_config(name, **options), toy_backbone() if backbone is None else backbone, facts or RunFacts()
    )
    return made.double()
