"""Methods by name."""

from collections.abc import Callable
from difflib import get_close_matches

from torch import nn

from fastgessl.config import MethodConfig, UsageError
from fastgessl.methods.base import Method, RunFacts

METHODS: dict[str, type[Method]] = {}
"""Every registered method, by the name that `MethodConfig.name` gives it."""


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that files a method under `name`. Raises ValueError if the name is taken."""

    def add(method: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(
                f"method '{name}' is registered already, by {METHODS[name].__name__}; {method.__name__} "
                "needs another name."
            )
        METHODS[name] = method
        return method

    return add


def build_method(config: MethodConfig, backbone: nn.Module, facts: RunFacts) -> Method:
    """The method that `config.name` names, over `backbone`: a module (B, 3, S, S) -> (B, F) with the width F
    as `.num_features`.

    `facts` are those of the run: its length, batch, views. Raises UsageError for an unknown name, and where
    the method cannot work with the facts.

    >>> from fastgessl.config import ModelConfig
    >>> from fastgessl.models import build_backbone
    >>> backbone = build_backbone(ModelConfig(stem="small", width=0.25))
    >>> type(build_method(MethodConfig(name="simclr"), backbone, RunFacts())).__name__
    'SimCLR'
    """
    if config.name not in METHODS:
        near = get_close_matches(config.name, METHODS, n=3, cutoff=0.3) or sorted(METHODS)
        raise UsageError(
            f"method.name '{config.name}' is no method that is known. Perhaps you meant {' or '.join(near)}?"
        )
    name, method = config.name, METHODS[config.name]
    wanted = method.views_per_sample
    if wanted is not None and facts.global_views != wanted:
        raise UsageError(
            f"method '{name}' takes {wanted} views of full size and the views section makes "
            f"{facts.global_views}. "
            "Choose a preset that has as many (`fastgessl recipes NAME` shows the method's own)."
        )
    if facts.local_views and not method.multi_crop:
        raise UsageError(
            f"method '{name}' has no use for smaller views and the views section makes {facts.local_views}. "
            "Set --views.local_views 0, or take a multi-crop method such as swav or dino."
        )
    return method(config, backbone, facts)


def check_prototypes(option: str, count: int, facts: RunFacts) -> None:
    """Raise UsageError if there are no more prototypes than classes: two classes would have to share one."""
    if facts.classes is not None and count <= facts.classes:
        raise UsageError(
            f"{option} is {count}, and the training images have {facts.classes} classes: no representation "
            f"could tell them all apart. Choose more of them, such as --{option} {10 * facts.classes}."
        )
