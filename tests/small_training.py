"""A training with steps of milliseconds, for every registered method."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished_run import forget_processes

from fastgessl import pipelines
from fastgessl.build import build_loader, make_plan
from fastgessl.config import Config
from fastgessl.distributed import build_accelerator
from fastgessl.training import loop
from fastgessl.training.signals import StopRequest
from fastgessl.training.state import Training

IMAGES = 48
# Narrow heads, and whatever any method keeps between steps: queues that fill and wrap, prototypes that freeze
# and thaw, a temperature that rises.
METHOD = {
    "projector_hidden": 12,
    "projector_out": 6,
    "predictor_hidden": 8,
    "temperature": 0.3,
    "momentum_start": 0.9,
    "moco": {"queue_length": 32},
    "swav": {"prototypes": 10, "queue_length": 32, "queue_start_epoch": 0.0, "freeze_epochs": 0.5},
    "dino": {
        "prototypes": 10,
        "freeze_epochs": 0.5,
        "teacher_temperature_start": 0.03,
        "teacher_warmup_epochs": 1.0,
    },
    "dissl": {"prototypes": 10},
}


def write_images(folder: Path) -> Path:
    """Random images with labels, as an .npz."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (IMAGES, 10, 10, 3), dtype=np.uint8), np.arange(IMAGES) % 4
    np.savez(folder / "images.npz", train_x=images, train_y=labels)
    return folder / "images.npz"


def small_config(data: Path, name: str = "simclr", **sections: dict[str, Any]) -> Config:
    """Two micro-batches of 8 a step, three steps an epoch; `sections` override single options."""
    given: dict[str, dict[str, Any]] = {
        "data": {"name": "npz", "root": data},
        "views": {"size": 8},
        "model": {"name": "test_resnet", "stem": "imagenet", "width": 1.0},
        "method": {"name": name, **METHOD},
        "optim": {"base_lr": 0.1},
        "schedule": {"warmup_epochs": 0.5},
        "train": {
            "batch_size": 16,
            "accumulate": 2,
            "epochs": 50,
            "max_steps": 5,
            "checkpoint_every": 1,
            "keep_checkpoints": 99,
        },
        "log": {"trackers": ()},
    }
    return Config.model_validate(
        {key: given.get(key, {}) | sections.get(key, {}) for key in given | sections}
    )


class NoEvaluation:
    """In place of a `RunEvaluation`: what is measured is another test's concern."""

    probe = None

    def observe(self, *_: object) -> None:
        pass


def start(config: Config, run: Path, resumed: Path | None = None) -> Training:
    """A fresh process's worth of training."""
    forget_processes()
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None
    accelerator = build_accelerator(config, run)
    loader = build_loader(config, images, accelerator)
    plan = make_plan(config, images, loader, accelerator)
    return Training(config, plan, accelerator, loader, None, resumed)


def run_steps(training: Training, run: Path, *, one: bool = False) -> int:
    """The trainer's own loop, to the end or for one step; returns the steps done."""
    stop = StopRequest()
    if one:
        stop.received = signal.SIGTERM
    loop.run_steps(training, NoEvaluation(), run, stop)  # type: ignore[arg-type]
    return training.step


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Where two nested states differ in any bit."""
    if isinstance(expected, torch.Tensor):
        same = (
            isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
        )
        return [] if same else [path]
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [path]
        return [
            place for key in expected for place in differences(found[key], expected[key], f"{path}.{key}")
        ]
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return [path]
        pairs = enumerate(zip(found, expected, strict=True))
        return [
            place for index, (one, other) in pairs for place in differences(one, other, f"{path}[{index}]")
        ]
    return [] if found == expected else [path]
