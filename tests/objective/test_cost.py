"""What a step costs in floating-point operations and memory, against a plain step: the bounds that
docs/gessl.md states.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import peak_bytes
from fastgessl.config import GesslConfig, MethodConfig, ModelConfig
from fastgessl.methods import RunFacts, build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL

SETTINGS = {
    "fast": GesslConfig(every=2, w_sigma=1.0),
    "head": GesslConfig(inner_steps=1, scope="head", w_sigma=1.0),
    "first_order": GesslConfig(inner_steps=1, hypergradient="first_order", w_sigma=1.0),
    "exact": GesslConfig(inner_steps=1, w_sigma=1.0),
    "finite_difference": GesslConfig(inner_steps=1, hypergradient="finite_difference", w_sigma=1.0),
    "exact, K 2": GesslConfig(inner_steps=2, w_sigma=1.0),
    "exact, K 2, graph kept": GesslConfig(inner_steps=2, checkpoint_inner_steps=False, w_sigma=1.0),
}


@pytest.fixture(scope="module")
def plain_flops():
    return flops(GesslConfig())


def flops(settings):
    """Floating-point operations of a SimCLR step on a ResNet-18 with 32-pixel views, averaged over `every`
    steps.
    """
    objective, views = resnet(settings, width=0.5, hidden=2048, images=2)
    with FlopCounterMode(display=False) as counter:
        for step in range(settings.every):
            objective(views, step).loss.backward()
    return counter.get_total_flops() / settings.every


def resnet(settings, *, width, hidden, images):
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(name="resnet18", stem="small", width=width))
    method = build_method(MethodConfig(projector_hidden=hidden), backbone, RunFacts())
    return GeSSL(method, settings), [torch.randn(images, 3, 32, 32), torch.randn(images, 3, 32, 32)]


def peak(settings):
    """Bytes; with narrow layers and enough images for activations to outweigh weights, as they do in
    training.
    """
    objective, views = resnet(settings, width=0.125, hidden=256, images=16)
    return peak_bytes(lambda: objective(views).loss.backward(), objective)


@pytest.mark.parametrize(
    ("preset", "bound"),
    [
        ("fast", 1.55),
        ("head", 1.1),
        ("first_order", 3.1),
        ("exact", 5.1),
        ("finite_difference", 5.1),
        ("exact, K 2", 10.2),
        ("exact, K 2, graph kept", 8.2),
    ],
)
def test_a_step_costs_at_most_the_stated_multiple_of_a_plain_step(
    plain_flops, preset, bound, record_property
):
    ratio = flops(SETTINGS[preset]) / plain_flops
    record_property("ratio", ratio)
    print(f"{preset}: {ratio:.2f} x a plain step")
    assert 1.0 < ratio <= bound


def test_memory_does_not_grow_with_the_number_of_exact_inner_steps():
    plain = peak(GesslConfig())
    one, three = (peak(GesslConfig(inner_steps=steps, w_sigma=1.0)) for steps in (1, 3))
    kept = peak(GesslConfig(inner_steps=3, w_sigma=1.0, checkpoint_inner_steps=False))
    print(
        f"peak of live tensors, x plain: K 1 {one / plain:.2f}, K 3 {three / plain:.2f}, K 3 with the graph "
        f"kept {kept / plain:.2f}"
    )
    assert three <= 1.15 * one and three <= 3.5 * plain
    assert kept > 1.5 * three


def test_the_count_of_live_bytes_is_that_of_a_chain_of_known_sizes():
    layers = torch.nn.Sequential(*(torch.nn.Tanh() for _ in range(5)))
    x = torch.ones(1000, requires_grad=True)
    # Five outputs of 4 kB are saved until the backward; without a graph only one input and one output live at
    # a time.
    assert peak_bytes(lambda: layers(x), layers) == 5 * 4000
    with torch.no_grad():
        assert peak_bytes(lambda: layers(x), layers) == 2 * 4000
