"""The same training step by other trainers: their losses, heads and momentum updates around the same kind of
backbone.

lightly (modules and losses), stable-pretraining (its method classes). Batch, views, precision and optimiser
are the bench's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgessl.config import MethodConfig

Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Trainer:
    """What a bench step needs of one: weights, the loss of a batch's views, and what follows the optimiser
    step.
    """

    module: nn.Module
    loss: Loss
    after: Callable[[], object] = lambda: None


def lightly_simclr(backbone: nn.Module, config: MethodConfig) -> Trainer:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    head = SimCLRProjectionHead(_width(backbone), config.projector_hidden, config.projector_out)
    criterion = NTXentLoss(temperature=config.temperature)
    return Trainer(
        nn.ModuleList([backbone, head]), lambda views: criterion(*(head(backbone(view)) for view in views))
    )


def lightly_byol(backbone: nn.Module, config: MethodConfig) -> Trainer:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    online = nn.Sequential(
        backbone, BYOLProjectionHead(_width(backbone), config.projector_hidden, config.projector_out)
    )
    predictor = BYOLPredictionHead(config.projector_out, config.predictor_hidden, config.projector_out)
    momentum, criterion = deepcopy(online).requires_grad_(False), NegativeCosineSimilarity()

    def loss(views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [momentum(view) for view in views]
        first, second = (predictor(online(view)) for view in views)
        return (criterion(first, targets[1]) + criterion(second, targets[0])) / 2

    return Trainer(nn.ModuleList([online, predictor, momentum]), loss, _lightly_momentum(online, momentum))


def lightly_dino(backbone: nn.Module, config: MethodConfig) -> Trainer:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    def head() -> nn.Module:
        return DINOProjectionHead(
            _width(backbone), config.projector_hidden, config.projector_out, config.dino.prototypes
        )

    online = nn.Sequential(backbone, head())
    momentum = nn.Sequential(deepcopy(backbone), head()).requires_grad_(False)
    momentum.load_state_dict(online.state_dict())
    criterion = DINOLoss(config.dino.prototypes)

    def loss(views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [momentum(view) for view in views[:2]]
        return criterion(targets, [online(view) for view in views], epoch=0)

    return Trainer(nn.ModuleList([online, momentum, criterion]), loss, _lightly_momentum(online, momentum))


def _lightly_momentum(online: nn.Module, momentum: nn.Module) -> Callable[[], object]:
    from lightly.models.utils import update_momentum

    return lambda: update_momentum(online, momentum, m=0.99)


@contextmanager
def _away_from_the_repository() -> Iterator[None]:
    """Inside, its root is not on the import path: transformers would take the folder kernels/ there for
    Hugging Face's package.
    """
    root, before = Path(__file__).resolve().parents[1], list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != root]
    try:
        yield
    finally:
        sys.path[:] = before


def stable_simclr(backbone: nn.Module, config: MethodConfig) -> Trainer:
    with _away_from_the_repository():
        from stable_pretraining.methods import SimCLR

    model = SimCLR(backbone, (config.projector_hidden, config.projector_out), config.temperature)
    return Trainer(model, lambda views: model(*views).loss)


def stable_byol(backbone: nn.Module, config: MethodConfig) -> Trainer:
    with _away_from_the_repository():
        from stable_pretraining.methods import BYOL

    heads = (config.projector_hidden, config.projector_out), (config.predictor_hidden, config.projector_out)
    model = BYOL(backbone, *heads)
    return Trainer(model, lambda views: model(*views).loss, _stable_momentum(model))


def stable_dino(backbone: nn.Module, config: MethodConfig) -> Trainer:
    with _away_from_the_repository():
        from stable_pretraining.methods import DINO

    model = DINO(backbone, config.projector_hidden, config.projector_out, config.dino.prototypes)
    return Trainer(model, lambda views: model(views[:2], views[2:]).loss, _stable_momentum(model))


def _stable_momentum(model: nn.Module) -> Callable[[], object]:
    from stable_pretraining.backbone import TeacherStudentWrapper

    wrappers = [module for module in model.modules() if isinstance(module, TeacherStudentWrapper)]
    return lambda: [wrapper.update_teacher() for wrapper in wrappers]


def _width(backbone: nn.Module) -> int:
    width = backbone.num_features
    assert isinstance(width, int)
    return width


PEERS: dict[str, dict[str, Callable[[nn.Module, MethodConfig], Trainer]]] = {
    "simclr": {"lightly": lightly_simclr, "stable-pretraining": stable_simclr},
    "byol": {"lightly": lightly_byol, "stable-pretraining": stable_byol},
    "dino": {"lightly": lightly_dino, "stable-pretraining": stable_dino},
}


def installed(peer: str) -> bool:
    return find_spec({"stable-pretraining": "stable_pretraining"}.get(peer, peer)) is not None
