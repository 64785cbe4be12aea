"""Mixed precision: parameters, inner steps, losses and π stay in float32; no cast weight is used twice."""

import pytest
import torch
from method_cases import ALL, cases

from fastgessl.config import GesslConfig
from fastgessl.objective import GeSSL

SETTINGS = [
    GesslConfig(inner_steps=1, inner_lr=0.05, hypergradient="exact", w_ssl=0.0, w_sigma=1.0),
    GesslConfig(inner_steps=0, inner_lr=0.05, w_ssl=0.0, w_sigma=1.0),
    GesslConfig(inner_steps=1, inner_lr=0.05, hypergradient="first_order", w_ssl=0.0, w_sigma=1.0),
    GesslConfig(inner_steps=1, inner_lr=0.05, hypergradient="finite_difference", w_ssl=0.0, w_sigma=1.0),
    GesslConfig(
        inner_steps=2, inner_lr=0.05, inner_momentum=0.5, hypergradient="exact", w_ssl=0.0, w_sigma=1.0
    ),
    GesslConfig(inner_steps=1, inner_lr=0.05, hypergradient="exact", scope="head", w_ssl=0.0, w_sigma=1.0),
]
# What GradScaler does: a float16 gradient of sigma is else below the smallest number (cosine 0.82 for MoCo,
# scaled 0.9999994).
LOSS_SCALE = 1024.0


def run(toys, name, settings, dtype=None):
    """Gradient and metrics of one step in float32 (no dtype) or under autocast."""
    method = toys.method(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        result = GeSSL(method, settings)(toys.views(images=32, dtype=torch.float32))
    (LOSS_SCALE * result.loss).backward()
    return toys.gradients(method) / LOSS_SCALE, result


def label(value):
    return (
        f"K{value.inner_steps}-{value.hypergradient}-{value.scope}"
        if isinstance(value, GesslConfig)
        else str(value)
    )


@pytest.mark.parametrize(
    ("name", "settings", "dtype"), cases(SETTINGS, [torch.bfloat16, torch.float16]), ids=label
)
def test_under_autocast_sigma_is_positive_and_its_gradient_within_0_98_cosine_of_float32(
    toys, name, settings, dtype, record_property
):
    expected, full = run(toys, name, settings)
    found, half = run(toys, name, settings, dtype)
    cosine = torch.cosine_similarity(found, expected, dim=0).item()
    record_property("cosine", cosine)
    print(
        f"{name} K {settings.inner_steps} {settings.hypergradient} {settings.scope} {dtype}: cosine "
        f"{cosine:.5f}"
    )
    assert half.metrics["sigma"] > 0
    assert half.metrics["sigma"].item() == pytest.approx(full.metrics["sigma"].item(), rel=0.1)
    assert cosine >= 0.98


def test_inner_forwards_keep_no_cast_weights(toys):
    cached = []
    method = toys.method("simclr", dtype=torch.float32)
    method.backbone[0].register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GeSSL(method, GesslConfig(inner_steps=1, w_sigma=1.0))(toys.views(dtype=torch.float32))
    assert cached == [True, False, False]


@pytest.mark.parametrize("name", ALL)
def test_the_ssl_gradient_under_autocast_equals_that_of_a_backward_outside_it(toys, name):
    found, result = run(toys, name, GesslConfig(w_sigma=1e-30), torch.bfloat16)
    method, views = toys.method(name, dtype=torch.float32), toys.views(images=32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = method.targets(views)
        out = method(views)
    assert out.projections.dtype == torch.float32 and result.outputs.projections.dtype == torch.float32
    method.loss(out, targets).backward()
    torch.testing.assert_close(found, toys.gradients(method), rtol=1e-6, atol=1e-9)


def test_inner_losses_in_float16_are_scaled_so_that_small_gradients_survive(toys):
    # SimCLR's loss divided by 1e6 has slopes that float16 rounds to zero or to one digit: unscaled, σ comes
    # out 1.7 times too large.
    method, reference = (toys.method("simclr", dtype=torch.float32) for _ in range(2))
    plain_loss = type(method).loss
    scale = 1e-6
    views = toys.views(images=32, dtype=torch.float32)
    settings = GesslConfig(inner_lr=0.05 / scale, w_ssl=0.0, w_sigma=1.0)
    method.loss = lambda out, aux=None: scale * plain_loss(method, out, aux)
    with torch.autocast("cpu", dtype=torch.float16):
        small = GeSSL(method, settings)(views)
    large = GeSSL(reference, settings.model_copy(update={"inner_lr": 0.05}))(views)
    assert small.metrics["sigma"].item() == pytest.approx(large.metrics["sigma"].item(), rel=0.05)
