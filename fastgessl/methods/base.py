"""What every self-supervised method is, pure functions of an encoder's outputs and one place where state
moves; and the methods by name.

A method is a module that owns the backbone, the heads and, if the paper has one, the momentum encoder.
`forward`, `targets`, `settle`, `loss` and `similarity` may be called many times in one step by GeSSL's inner
loop and write nothing except batch-norm statistics in `forward` and `targets`; `update_state` is called once
after the optimiser step and is the only writer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastgessl.config import MethodConfig, UsageError
from fastgessl.distributed import world_group
from fastgessl.models import apply_head, encode


@dataclass(frozen=True)
class RunFacts:
    """What a method must know of the run it is built for."""

    total_steps: int = 1
    """Optimiser steps of the whole run, for schedules of the method's own."""
    steps_per_epoch: float = 1.0
    """Optimiser steps in which every training image is seen once."""
    images_per_forward: int = 1
    """Images of one forward pass of all ranks together."""
    negatives: Literal["local", "global", "ring"] = "local"
    """Whether losses that compare images, or average over them, see this rank's images or all ranks', which
    "ring" passes around."""
    bi_level: bool = False
    """Whether GeSSL's inner steps run the loss as well, on this rank's images alone."""
    global_views: int = 2
    """How many of an image's views are of the full size. They come first."""
    local_views: int = 0
    """How many smaller views follow them (multi-crop)."""
    classes: int | None = None
    """Number of classes of the training images; None if they have no labels."""


@dataclass(frozen=True)
class Outputs:
    """What the encoder says of V views of N images. `predictions` exists for methods with a predictor or a
    second head.
    """

    features: Tensor
    """(V, N, F), the representation that is kept."""
    projections: Tensor
    """(V, N, D)."""
    predictions: Tensor | None = None
    """(V, N, D)."""
    prototypes: Tensor | None = None
    """(K, D), the last layer over `projections` at the weights of this forward, so that a loss stays a
    function of outputs."""
    predicted_prototypes: Tensor | None = None
    """(K, D), the same over `predictions`."""

    def detached(self) -> "Outputs":
        """The same numbers without a past."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.detach() for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Similarity:
    """One part of π of a task: row i is softmax(query_i·keyᵀ / temperature). query (M, D), key (K, D).

    Keys are the other view's embeddings, and the row says which of the N images view i shows; or they are
    prototypes.
    """

    query: Tensor
    key: Tensor
    temperature: float


class Method(nn.Module):
    """Base of all methods. A subclass defines `forward`, `loss` and `similarity`, and `targets` and
    `update_state` if it keeps a state.

    The kept encoder is the submodule `backbone`; every other trainable parameter belongs to a head. Outputs
    are float32 or float64, also under autocast.
    """

    backbone: nn.Module
    views_per_sample: int | None = None
    """How many views of full size `forward` takes; None if any number will do. The objective checks it."""
    multi_crop: bool = False
    """Whether any number of smaller views may follow them."""
    needs_labels: bool = False
    """Whether `targets` must be given labels."""
    gathers: bool = False
    """Whether `loss` exchanges rows with other ranks (outside `fastgessl.distributed.rank_local`)."""
    rings: bool = False
    """Whether `loss` honours `exchange`."""
    exchange: Literal["gather", "ring"] = "gather"
    """How the keys of all ranks meet this rank's queries: a copy of all of them here, or one rank's after the
    other, passed around."""

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that `loss` exchanges rows with; None for this one alone."""
        return world_group() if self.gathers else None

    def check_views(self, views: Sequence[Tensor], labels: Tensor | None = None) -> None:
        """Raise UsageError unless these are as many views as the method takes, of the same samples, with
        labels if it needs them.
        """
        wanted = self.views_per_sample
        if not views or (
            wanted is not None and (len(views) < wanted or (len(views) > wanted and not self.multi_crop))
        ):
            least = "" if wanted and not self.multi_crop else "at least "
            needs = f"{least}{wanted or 1} view" + "s" * ((wanted or 1) > 1)
            raise UsageError(
                f"{type(self).__name__} needs {needs} of each sample and was given {len(views)}. Pass a list "
                "of that many tensors."
            )
        rows = [len(view) for view in views]
        if len(set(rows)) > 1:
            raise UsageError(
                f"the views have {rows} rows. Row i of every view belongs to sample i: give all of them one "
                "row per sample."
            )
        if self.needs_labels and (labels is None or len(labels) != rows[0]):
            found = "none" if labels is None else f"{len(labels)} for {rows[0]} samples"
            raise UsageError(
                f"{type(self).__name__} learns from labels and was given {found}. Pass `labels`, one per "
                "sample."
            )

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Views, a list of V tensors (N, 3, S, S), or their `features` (V, N, F) if only heads run. Moves
        batch-norm statistics.
        """
        raise NotImplementedError

    def targets(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Any:
        """What stays constant through the inner loop, computed without gradient: momentum-encoder outputs, a
        queue, `labels` (N,) int64. None by default."""
        return None

    def settle(self, out: Outputs, aux: Any = None) -> Any:
        """`targets` with what follows from the step's first outputs and stays constant from there on, such as
        SwAV's codes. Pure; `out` is detached. `aux` itself by default."""
        return aux

    def loss(self, out: Outputs, aux: Any = None) -> Tensor:
        """The method's SSL loss: Outputs and `targets` -> (). Pure."""
        raise NotImplementedError

    def similarity(self, out: Outputs, aux: Any = None) -> Sequence[Similarity]:
        """π of the task, one `Similarity` a direction, for σ-measurement. Pure."""
        raise NotImplementedError

    def measures(self, out: Outputs, aux: Any = None) -> dict[str, Tensor]:
        """Terms of the loss worth a curve of their own, each () and detached. None by default."""
        return {}

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """Parameters that optimiser step `step` must not move, such as SwAV's prototypes in its first epoch.
        None by default.
        """
        return ()

    def update_state(self, passes: Sequence[tuple[Outputs, Any]], step: int) -> None:
        """Advance momentum encoder, queue, centre, once after optimiser step `step`; `passes`: its
        micro-batches' outputs and targets.
        """


class ProjectedMethod(Method):
    """Base of a method whose loss sees projections of the backbone's features, and predictions of them if it
    has a `predictor`. A subclass makes its heads in `__init__`, after this one's.
    """

    compares_images = True
    """Whether the loss compares images, or averages over them, so that other ranks' matter to it."""
    projector: nn.Module

    def __init__(self, config: MethodConfig, backbone: nn.Module, facts: RunFacts):
        super().__init__()
        self.backbone = backbone
        self.temperature = config.temperature
        self.gathers = self.compares_images and facts.negatives != "local"

    def forward(self, views: Sequence[Tensor] | None = None, *, features: Tensor | None = None) -> Outputs:
        """Views, or their features (V, N, F) -> projections (V, N, D), and predictions (V, N, D) of them."""
        features = encode(self.backbone, views, features)
        projections = apply_head(self.projector, features)
        predictor = getattr(self, "predictor", None)
        predictions = None if predictor is None else apply_head(predictor, projections)
        return Outputs(features, projections, predictions)


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
