"""What a step costs in floating-point operations, against a plain step: the bounds that docs/gessl.md states."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgessl.config import GesslConfig, MethodConfig, ModelConfig
from fastgessl.methods import build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL

SETTINGS = {
    "fast": GesslConfig(every=2, w_sigma=1.0),
    "head": GesslConfig(inner_steps=1, scope="head", w_sigma=1.0),
    "first_order": GesslConfig(inner_steps=1, hypergradient="first_order", w_sigma=1.0),
    "exact": GesslConfig(inner_steps=1, w_sigma=1.0),
    "finite_difference": GesslConfig(inner_steps=1, hypergradient="finite_difference", w_sigma=1.0),
    "exact, K 2": GesslConfig(inner_steps=2, w_sigma=1.0),
}


@pytest.fixture(scope="module")
def plain_flops():
    return flops(GesslConfig())


def flops(settings):
    """Floating-point operations of a SimCLR step on a ResNet-18 with 32-pixel views, averaged over `every` steps."""
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(name="resnet18", stem="small", width=0.5))
    objective = GeSSL(build_method(MethodConfig(), backbone, total_steps=1, negatives="local"), settings)
    views = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    with FlopCounterMode(display=False) as counter:
        for step in range(settings.every):
            objective(views, step).loss.backward()
    return counter.get_total_flops() / settings.every


@pytest.mark.parametrize(
    ("preset", "bound"),
    [("fast", 1.55), ("head", 1.1), ("first_order", 3.1), ("exact", 5.1), ("finite_difference", 5.1), ("exact, K 2", 8.2)],
)
def test_a_step_costs_at_most_the_stated_multiple_of_a_plain_step(plain_flops, preset, bound, record_property):
    ratio = flops(SETTINGS[preset]) / plain_flops
    record_property("ratio", ratio)
    print(f"{preset}: {ratio:.2f} x a plain step")
    assert 1.0 < ratio <= bound
