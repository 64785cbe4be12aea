"""The first 50 steps of each preset and method on digits follow the stored curves.

`python tests/objective/test_golden.py` stores them anew. Do so only for a change that is meant to alter
training, and say in its commit why the curves moved.

All is float64 and all random numbers are NumPy's legacy ones, which are the same on every machine; what
differs between processors is the order of sums. The methods are those of the presets with a convolution of a
few channels as backbone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fastgessl.config import GesslConfig, MethodConfig
from fastgessl.methods import RunFacts, build_method
from fastgessl.objective import GeSSL
from fastgessl.recipes import load

FOLDER = Path(__file__).with_name("golden")
PRESETS, METHODS = ("fast", "head", "exact"), ("simclr", "byol")
STEPS, IMAGES = 50, 32
# Between the two that the tests below measure: 1e4 rounding errors in every weight move a curve by at most
# 7e-11, a gradient of sigma that is 0.1 % wrong moves every loss curve by at least 1.5e-4.
TOLERANCE = 1e-7


def settings_of(preset: str) -> GesslConfig:
    """The shipped preset, with α raised so that σ is far from the rounding of a sum."""
    settings = load(f"digits-simclr-gessl-{preset}").config.gessl
    return settings.model_copy(update={"inner_lr": 0.1})


def build(name: str) -> nn.Module:
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 12),
    )
    backbone.num_features = 12
    config = MethodConfig(name=name, projector_hidden=24, projector_out=8, predictor_hidden=16)
    method = build_method(config, backbone, RunFacts(total_steps=STEPS)).double()
    random = np.random.RandomState(0)
    with torch.no_grad():
        for key, parameter in method.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(
                    torch.from_numpy(random.standard_normal(tuple(parameter.shape)) / fan_in**0.5)
                )
            elif key.endswith("bias"):
                parameter.zero_()
    return method


def curve(name: str, settings: GesslConfig, *, disturbance: float = 0.0) -> dict[str, list[float]]:
    """loss_ssl of every step, sigma and delta_loss of every step that has them, and the weights' norm after
    every step.
    """
    method = build(name)
    random = np.random.RandomState(1)
    digits = load_digits().images / 16.0
    objective = GeSSL(method, settings)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(1 + disturbance)
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    measured: dict[str, list[float]] = {}
    for step in range(STEPS):
        clean = digits[random.randint(len(digits), size=IMAGES)]
        views = [
            torch.from_numpy(clean + 0.2 * random.standard_normal(clean.shape))
            .unsqueeze(1)
            .expand(-1, 3, -1, -1)
            for _ in range(2)
        ]
        result = objective(views, step)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_state([(result.outputs, result.targets)], step)
        norm = torch.stack([parameter.detach().norm() for parameter in trained]).norm()
        for key, value in (result.metrics | {"norm": norm}).items():
            measured.setdefault(key, []).append(float(f"{value.item():.12g}"))
    return measured


def distance(found: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference of each curve."""
    assert {key: len(values) for key, values in found.items()} == {
        key: len(values) for key, values in expected.items()
    }
    return {key: float(np.max(np.abs(np.divide(found[key], values) - 1))) for key, values in expected.items()}


def golden(name: str, preset: str) -> dict[str, list[float]]:
    return json.loads((FOLDER / f"{name}-{preset}.json").read_text())


every_curve = pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for preset in PRESETS for name in METHODS]
)


@every_curve
def test_the_first_50_steps_follow_the_stored_curve(name, preset):
    moved = distance(curve(name, settings_of(preset)), golden(name, preset))
    assert max(moved.values()) <= TOLERANCE, moved


@every_curve
def test_rounding_moves_no_curve_by_a_tenth_of_the_tolerance(name, preset):
    moved = distance(curve(name, settings_of(preset), disturbance=1e-12), golden(name, preset))
    assert max(moved.values()) <= TOLERANCE / 10, moved


@every_curve
def test_a_gradient_of_sigma_that_is_wrong_by_a_thousandth_moves_the_curve_a_hundred_times_the_tolerance(
    name, preset
):
    settings = settings_of(preset)
    moved = distance(
        curve(name, settings.model_copy(update={"w_sigma": 1.001 * settings.w_sigma})), golden(name, preset)
    )
    assert moved["loss_ssl"] >= 100 * TOLERANCE, moved


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for preset in PRESETS:
        for name in METHODS:
            (FOLDER / f"{name}-{preset}.json").write_text(json.dumps(curve(name, settings_of(preset))) + "\n")


if __name__ == "__main__":
    main()
