"""How fast is a whole training step, loader included: ours, under GeSSL, and other trainers'?

Every contender of a case has a backbone of one kind, one batch size, the resident loader's views of the same
images, one precision and SGD. On a GPU: bfloat16, channels_last, compiled and not.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from bench import results
from fastgessl import pipelines
from fastgessl.build import view_specs
from fastgessl.config import Config, GesslConfig, MethodConfig, ModelConfig
from fastgessl.methods import RunFacts, build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL
from fastgessl.pipelines import ArrayImages, Batch
from fastgessl.recipes import load, parts


@dataclass(frozen=True)
class Case:
    """A training step to measure: a recipe's heads and views over a backbone, `batch` source images of
    `stored` pixels.
    """

    recipe: str
    model: ModelConfig
    size: int
    batch: int
    stored: int

    @property
    def config(self) -> Config:
        config = load(self.recipe).config
        views = config.views.model_copy(update={"size": self.size, "local_views": 0})
        return config.model_copy(update={"views": views, "model": self.model})

    def batches(self) -> Iterator[Batch]:
        """Endless batches of the recipe's global views, made by the resident engine from random images."""
        shape = (4 * self.batch, self.stored, self.stored, 3)
        images = ArrayImages(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        specs = view_specs(self.config)
        loader = pipelines.build(images, specs, batch_size=self.batch, engine="resident", device=DEVICE)
        while True:
            yield from loader


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    SMALL, RESNET, VIT = (
        ModelConfig(stem="small"),
        ModelConfig(name="resnet50"),
        ModelConfig(name="vit_small_patch16_224"),
    )
    CASES = {
        "simclr-resnet18-32": Case("cifar10-simclr", SMALL, 32, 512, 32),
        "byol-resnet18-32": Case("cifar10-byol", SMALL, 32, 512, 32),
        "simclr-resnet50-224": Case("imagenet-simclr", RESNET, 224, 256, 256),
        "byol-resnet50-224": Case("imagenet-byol", RESNET, 224, 256, 256),
        "simclr-vit-224": Case("imagenet-simclr", VIT, 224, 256, 256),
        "dino-vit-224": Case("imagenet-dino", VIT, 224, 256, 256),
    }
else:
    SMALL = ModelConfig(width=0.25, stem="small")
    CASES = {
        f"{method}-resnet18-32": Case(f"cifar10-{method}", SMALL, 32, 64, 32)
        for method in ("simclr", "byol", "dino")
    }


def tiny_case(name: str) -> Case:
    """The same method on the smallest network, to try it out."""
    return Case(f"digits-{name.split('-')[0]}", ModelConfig(width=0.125, stem="small"), 16, 8, 16)


@dataclass(frozen=True)
class Trainer:
    """What a step needs of a trainer: weights, the loss of a batch's views, and what follows the optimizer
    step.
    """

    module: nn.Module
    loss: Callable[[Sequence[Tensor]], Tensor]
    after: Callable[[], object] = lambda: None


def ours(case: Case, settings: GesslConfig, *, compiled: bool = False) -> Trainer:
    """The objective that `fastgessl train` runs."""
    facts = RunFacts(total_steps=100_000, images_per_forward=case.batch)
    method = build_method(case.config.method, build_backbone(case.model), facts)
    if compiled:
        method.backbone.compile()
    objective = GeSSL(method, settings)
    steps, passed = count(), []

    def loss(views: Sequence[Tensor]) -> Tensor:
        result = objective(views, next(steps))
        passed[:] = [(result.outputs, result.targets)]
        return result.loss

    return Trainer(objective, loss, lambda: method.update_state(passed, 0))


def lightly(backbone: nn.Module, config: MethodConfig) -> Trainer:
    """lightly's modules and losses, put together as its examples do."""
    from lightly import loss as losses
    from lightly.models import modules
    from lightly.models.utils import update_momentum

    inner = backbone.num_features, config.projector_hidden, config.projector_out
    if config.name == "simclr":
        online = nn.Sequential(backbone, modules.SimCLRProjectionHead(*inner))
        nt_xent = losses.NTXentLoss(temperature=config.temperature)
        return Trainer(online, lambda views: nt_xent(*map(online, views)))
    if config.name == "byol":
        online = nn.Sequential(backbone, modules.BYOLProjectionHead(*inner))
        predictor = modules.BYOLPredictionHead(inner[2], config.predictor_hidden, inner[2])
        similarity = losses.NegativeCosineSimilarity()

        def loss(views: Sequence[Tensor]) -> Tensor:
            with torch.no_grad():
                targets = [momentum(view) for view in views]
            first, second = (predictor(online(view)) for view in views)
            return (similarity(first, targets[1]) + similarity(second, targets[0])) / 2

        criterion: nn.Module = predictor
    else:
        online = nn.Sequential(backbone, modules.DINOProjectionHead(*inner, config.dino.prototypes))
        criterion = losses.DINOLoss(config.dino.prototypes)

        def loss(views: Sequence[Tensor]) -> Tensor:
            with torch.no_grad():
                targets = [momentum(view) for view in views[:2]]
            return criterion(targets, [online(view) for view in views], epoch=0)

    momentum = deepcopy(online).requires_grad_(False)
    module = nn.ModuleList([online, momentum, criterion])
    return Trainer(module, loss, lambda: update_momentum(online, momentum, m=0.99))


def stable_pretraining(backbone: nn.Module, config: MethodConfig) -> Trainer:
    """stable-pretraining's method classes."""
    # With the repository on the import path, transformers would take its folder kernels/ for Hugging Face's
    # package.
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != results.ROOT]
    with patch.object(sys, "path", elsewhere):
        from stable_pretraining import methods
        from stable_pretraining.backbone import TeacherStudentWrapper

    heads = config.projector_hidden, config.projector_out
    if config.name == "simclr":
        model = methods.SimCLR(backbone, heads, config.temperature)
    elif config.name == "byol":
        model = methods.BYOL(backbone, heads, (config.predictor_hidden, config.projector_out))
    else:
        model = methods.DINO(backbone, *heads, config.dino.prototypes)
    wrappers = [module for module in model.modules() if isinstance(module, TeacherStudentWrapper)]

    def loss(views: Sequence[Tensor]) -> Tensor:
        return model(views[:2], views[2:]).loss if config.name == "dino" else model(*views).loss

    return Trainer(model, loss, lambda: [wrapper.update_teacher() for wrapper in wrappers])


OTHERS = {"lightly": lightly, "stable-pretraining": stable_pretraining}


class Step:
    """One contender's training steps, from the loader's next batch to the moved weights.

    It is built when it is first called: a contender without room fails there, and alone.
    """

    def __init__(self, make: Callable[[], Trainer], case: Case, steps: int = 1) -> None:
        self.make, self.case, self.steps = make, case, steps
        self.trainer: Trainer | None = None

    def __call__(self) -> None:
        if self.trainer is None:
            self.trainer = self.make()
            self.trainer.module.to(DEVICE, memory_format=torch.channels_last).train()
            trained = [weight for weight in self.trainer.module.parameters() if weight.requires_grad]
            self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
            # Batches of its own: an iterator in which one contender has run out of memory has ended for all.
            self.batches = self.case.batches()
        for _ in range(self.steps):
            views = next(self.batches).views
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                loss = self.trainer.loss(views)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.trainer.after()


def contenders(case: Case) -> dict[str, Step | str]:
    """Who takes part, ours first, and last what must be compiled."""
    found: dict[str, Step | str] = {"ours": Step(lambda: ours(case, GesslConfig()), case)}
    for preset, part in parts("gessl").items():
        settings = GesslConfig(**part["config"]["gessl"])
        found[f"GeSSL, {preset}"] = Step(lambda settings=settings: ours(case, settings), case, settings.every)
    for name, make in OTHERS.items():
        if find_spec(name.replace("-", "_")) is None:
            found[name] = "not installed"
        else:
            found[name] = Step(lambda make=make: make(build_backbone(case.model), case.config.method), case)
    if DEVICE == "cuda":
        found["ours, compiled"] = Step(lambda: ours(case, GesslConfig(), compiled=True), case)
    return found


@pytest.mark.parametrize("name", CASES)
def test_step(name: str, contend: Any, tiny: bool) -> None:
    case = tiny_case(name) if tiny else CASES[name]
    who = contenders(case)
    calls = {one: step.steps for one, step in who.items() if isinstance(step, Step)}
    about = {"case": name, "recipe": case.recipe, "size": case.size, "batch": case.batch}
    contend(about, who, calls, {"images_per_second": case.batch})


@pytest.mark.parametrize("preset", ["plain", "exact"])
def test_where_the_time_goes(preset: str, keep: Any, benchmark: Any, request: Any, tiny: bool) -> None:
    """The heaviest operations of a step; the trace of it lies beside the results."""
    case = tiny_case("simclr-") if tiny else CASES["simclr-resnet18-32"]
    settings = load("digits-simclr-gessl-exact").config.gessl if preset == "exact" else GesslConfig()
    step = Step(lambda: ours(case, settings), case)
    step()
    with profile() as profiler:
        benchmark.pedantic(step, rounds=3)
    trace = results.place(f"step-{preset}.trace.json", request.config.getoption("out"))
    profiler.export_chrome_trace(str(trace))
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    heaviest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))[:25]
    rows = {
        event.key: {"microseconds": getattr(event, key) / 3, "calls": event.count / 3} for event in heaviest
    }
    keep({"what": "heaviest operations", "preset": preset, "trace": trace.name}, rows)
