"""Whole training steps, loader included: ours, under GeSSL, and other trainers', in turns within one run.

    python -m bench.steps [--cases simclr-resnet18-32 ...] [--rounds 20] [--seconds 60] [--out DIR]

Every contender of a case has a backbone of one kind, one batch size, the same resident loader's views, one
precision and SGD. Rates are source images a second. On a GPU: bfloat16, channels_last, compiled and not, and
peak memory of each contender by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import results
from bench.attempts import ANYTHING, NO_ROOM, NO_TIME, attempt
from bench.peers import PEERS, Trainer, installed
from bench.timing import in_turns, ratio, timed, wait
from fastgessl import pipelines
from fastgessl.build import view_specs
from fastgessl.config import Config, GesslConfig, MethodConfig, ModelConfig
from fastgessl.methods import METHODS, Method, RunFacts, build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL
from fastgessl.pipelines import ArrayImages, Batch
from fastgessl.recipes import load, parts

PLAIN, COMPILED = "ours", "ours, compiled"
PEER_NAMES = {name for made in PEERS.values() for name in made}


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

    @property
    def method(self) -> str:
        return self.recipe.split("-")[1]


SMALL = {"stem": "small"}
CASES = {
    "simclr-resnet18-32": Case("cifar10-simclr", ModelConfig(**SMALL), 32, 512, 32),
    "byol-resnet18-32": Case("cifar10-byol", ModelConfig(**SMALL), 32, 512, 32),
    "simclr-resnet50-224": Case("imagenet-simclr", ModelConfig(name="resnet50"), 224, 256, 256),
    "byol-resnet50-224": Case("imagenet-byol", ModelConfig(name="resnet50"), 224, 256, 256),
    "simclr-vit-224": Case("imagenet-simclr", ModelConfig(name="vit_small_patch16_224"), 224, 256, 256),
    "dino-vit-224": Case("imagenet-dino", ModelConfig(name="vit_small_patch16_224"), 224, 256, 256),
}
CPU_CASES = {
    "simclr-resnet18-32": Case("cifar10-simclr", ModelConfig(width=0.25, **SMALL), 32, 64, 32),
    "byol-resnet18-32": Case("cifar10-byol", ModelConfig(width=0.25, **SMALL), 32, 64, 32),
    "dino-resnet18-32": Case("cifar10-dino", ModelConfig(width=0.25, **SMALL), 32, 64, 32),
}
TINY_CASES = {"simclr-resnet18-16": Case("digits-simclr", ModelConfig(width=0.125, **SMALL), 16, 8, 16)}


def main() -> None:
    cases = CASES if torch.cuda.is_available() else CPU_CASES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="time limit of a case, start-up apart")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args()
    measured = {name: measure(cases[name], arguments.rounds, arguments.seconds) for name in arguments.cases}
    path = results.write("steps", {"cases": measured}, arguments.out)
    for name, found in measured.items():
        Console().print(table(name, found))
    print(path)


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """One case: a row a contender, and where the time of our steps goes."""
    *_, measured = measurements(case, rounds, seconds)
    return measured


def measurements(case: Case, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """`measure`, with one contender more each time. Absent: a peer that fails, what `seconds` leave no time
    for. Ours is an error.
    """
    if case.method not in METHODS:
        yield {"absent": f"no method is registered as {case.method}"}
        return
    # Else the compiled contender meets another case's guards, and torch compiles for any size.
    torch._dynamo.reset()
    device, until, made = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        time.perf_counter() + seconds,
        contenders(case),
    )
    found = _Found(case, device)
    for number, (name, make) in enumerate(made.items()):
        left = until - time.perf_counter()
        if make is None:
            found.rows[name] = {"absent": "not installed"}
        elif name != PLAIN and "seconds" not in found.rows[PLAIN]:
            found.rows[name] = {"absent": "there is no step of ours to compare with"}
        elif name != PLAIN and left <= 0:
            found.rows[name] = NO_TIME
        else:
            work = partial(found.add, name, make, rounds, max(left, 0.0) / (len(made) - number))
            found.rows[name] = attempt(work, forgiven(name))
        yield found.record()


class _Found:
    """What is known of a case. Of its contenders only ours stays on the device, because the others take turns
    with it.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.plain: Step | None = None
        self.rows: dict[str, dict[str, Any]] = {}
        self.split: dict[str, dict[str, float]] = {}

    def add(self, name: str, make: Callable[[], Trainer], rounds: int, seconds: float) -> dict[str, Any]:
        """The row of one contender."""
        # Batches of its own: an iterator in which one contender has run out of memory has ended for all.
        batches = batches_of(self.case, self.device)
        next(batches)
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        step = Step(make(), batches, self.device)
        peak = _peak_bytes(step) - held if self.device.type == "cuda" else None
        plain = self.plain = self.plain or step
        samples = in_turns({PLAIN: plain.group} | {name: step.group}, rounds=rounds, budget=seconds)
        if isinstance(step.trainer.module, GeSSL):
            self.split[name] = split(step)
        taken, views = samples[name], self.case.config.views.global_views or 2
        each = statistics.median(taken) / step.grouped
        return {
            "peak_bytes": peak,
            "seconds": each,
            "images_per_second": self.case.batch / each,
            "views_per_second": views * self.case.batch / each,
            "ratio_to_ours": ratio(taken, samples[PLAIN]) / step.grouped,
            "samples": [seconds / step.grouped for seconds in taken],
        }

    def record(self) -> dict[str, Any]:
        return {
            "recipe": self.case.recipe,
            "model": self.case.model.model_dump(mode="json"),
            "size": self.case.size,
            "batch": self.case.batch,
            "precision": "bf16" if self.device.type == "cuda" else "fp32",
            "rows": dict(self.rows),
            "split": dict(self.split),
        }


def forgiven(name: str) -> tuple[type[Exception], ...]:
    """What may keep a contender out: anything a peer, a lack of room a dearer step of ours, nothing ours."""
    if name in PEER_NAMES:
        return ANYTHING
    return () if name == PLAIN else NO_ROOM


def contenders(case: Case) -> dict[str, Callable[[], Trainer] | None]:
    """Who takes part, ours first, and last what must be compiled; None for a trainer that is not installed."""
    found: dict[str, Callable[[], Trainer] | None] = {PLAIN: partial(ours, case, GesslConfig())}
    for name, peer in PEERS.get(case.method, {}).items():
        found[name] = partial(_peer, peer, case) if installed(name) else None
    for preset, part in parts("gessl").items():
        found[f"GeSSL, {preset}"] = partial(ours, case, GesslConfig(**part["config"]["gessl"]))
    if torch.cuda.is_available():
        found[COMPILED] = partial(ours, case, GesslConfig(), compiled=True)
    return found


def ours(case: Case, settings: GesslConfig, *, compiled: bool = False) -> Trainer:
    """The objective that `fastgessl train` runs."""
    method = build_method(
        case.config.method,
        build_backbone(case.model),
        RunFacts(total_steps=100_000, images_per_forward=case.batch),
    )
    if compiled:
        method.backbone.compile()
    objective, done, passed = GeSSL(method, settings), count(), []

    def loss(views: Sequence[Tensor]) -> Tensor:
        result = objective(views, next(done))
        passed[:] = [(result.outputs, result.targets)]
        return result.loss

    return Trainer(objective, loss, lambda: method.update_state(passed, 0))


def _peer(peer: Callable[[nn.Module, MethodConfig], Trainer], case: Case) -> Trainer:
    return peer(build_backbone(case.model), case.config.method)


class Step:
    """One contender's training step, from the loader's next batch to the moved weights."""

    def __init__(self, trainer: Trainer, batches: Iterator[Batch], device: torch.device) -> None:
        self.trainer, self.batches, self.device = trainer, batches, device
        trainer.module.to(device, memory_format=torch.channels_last).train()
        trained = [parameter for parameter in trainer.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
        self.grouped = trainer.module.settings.every if isinstance(trainer.module, GeSSL) else 1
        """Steps that belong together: sigma may come on every second one."""

    def group(self) -> None:
        for _ in range(self.grouped):
            self.backward(self.forward(self.data()))
            self.update()

    def data(self) -> list[Tensor]:
        return next(self.batches).views

    def forward(self, views: list[Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.trainer.loss(views)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainer.after()


def split(step: Step, rounds: int = 5) -> dict[str, float]:
    """Mean seconds of a step's parts, the device waited for after each, so that together they take longer
    than the step.

    sigma is what the objective does beyond its first targets, forward and loss; without GeSSL it is what the
    objective costs by itself.
    """
    found = [_split_once(step) for _ in range(rounds * step.grouped)]
    return {part: statistics.fmean(seconds[part] for seconds in found) for part in found[0]}


def _split_once(step: Step) -> dict[str, float]:
    method, parts_taken = step.trainer.module.method, {}
    assert isinstance(method, Method)
    views = timed(parts_taken, "data", step.data)
    with ExitStack() as stack:
        for part in ("targets", "forward", "loss"):
            stack.enter_context(_first_call_timed(method, part, parts_taken))
        loss = timed(parts_taken, "sigma", lambda: step.forward(views))
    parts_taken["sigma"] -= parts_taken["targets"] + parts_taken["forward"] + parts_taken["loss"]
    timed(parts_taken, "backward", loss.backward)
    timed(parts_taken, "update", step.update)
    return parts_taken


@contextmanager
def _first_call_timed(method: Method, part: str, parts_taken: dict[str, float]) -> Iterator[None]:
    """Inside, the first call of the method's `part` is timed; the inner steps' calls are sigma's."""
    original = getattr(method, part)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if part in parts_taken:
            return original(*args, **kwargs)
        return timed(parts_taken, part, lambda: original(*args, **kwargs))

    object.__setattr__(method, part, wrapped)
    try:
        yield
    finally:
        object.__delattr__(method, part)


def batches_of(case: Case, device: torch.device) -> Iterator[Batch]:
    """Endless batches of the recipe's global views, made by the resident engine from random images."""
    generator = np.random.default_rng(0)
    images = ArrayImages(
        generator.integers(0, 256, (4 * case.batch, case.stored, case.stored, 3), dtype=np.uint8)
    )
    loader = pipelines.build(
        images, view_specs(case.config), batch_size=case.batch, engine="resident", device=str(device)
    )
    while True:
        yield from loader


def _peak_bytes(step: Step) -> int:
    """Most memory that PyTorch held on the GPU during a group of steps, after one that warms up."""
    step.group()
    wait()
    torch.cuda.reset_peak_memory_stats()
    step.group()
    wait()
    return torch.cuda.max_memory_allocated()


def table(name: str, measured: dict[str, Any]) -> Table:
    """The rows as printed."""
    found = Table(title=f"{name}: batch {measured.get('batch')}, {measured.get('precision')}")
    for column in ("trainer", "images/s", "views/s", "x ours", "ms a step", "peak, MiB"):
        found.add_column(column)
    for trainer, row in measured.get("rows", {}).items():
        if "seconds" not in row:
            found.add_row(trainer, row.get("absent", row.get("error")))
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        rates = (
            f"{row['images_per_second']:.0f}",
            f"{row['views_per_second']:.0f}",
            f"{row['ratio_to_ours']:.2f}",
        )
        found.add_row(trainer, *rates, f"{1000 * row['seconds']:.1f}", peak)
    return found


if __name__ == "__main__":
    main()
