"""What has no second derivative is refused in exact mode, or avoided, and never gives a wrong gradient
silently.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.function import once_differentiable

from fastgessl.config import GesslConfig, UsageError
from fastgessl.models import synchronise_batch_norm
from fastgessl.objective import GeSSL

EXACT = GesslConfig(inner_steps=1, inner_lr=0.1, w_ssl=0.0, w_sigma=1.0)


class Cube(torch.autograd.Function):
    """x³ whose backward forgets that it depends on x: right once, wrong twice, with no error from torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope


class HonestCube(torch.autograd.Function):
    twice_differentiable = True

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


class CubeOnce(torch.autograd.Function):
    forward = HonestCube.forward

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def method_with(toys, layer):
    method = toys.method("simclr")
    method.backbone.append(layer)
    return method


def gradient(toys, method, settings):
    GeSSL(method, settings)(toys.views()).loss.backward()
    return toys.gradients(method)


@pytest.mark.parametrize("function", [Cube, CubeOnce])
def test_a_hand_written_function_is_refused_in_exact_mode_with_the_ways_out(toys, function):
    with pytest.raises(UsageError, match=r"CubeBackward|CubeOnceBackward") as refusal:
        GeSSL(method_with(toys, Applied(function.apply)), EXACT)(toys.views())
    assert "finite_difference" in str(refusal.value) and "first_order" in str(refusal.value)


def test_a_hand_written_function_that_vouches_for_itself_gives_the_right_gradient(toys):
    expected = gradient(toys, method_with(toys, Applied(lambda x: x**3)), EXACT)
    found = gradient(toys, method_with(toys, Applied(HonestCube.apply)), EXACT)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "way_out",
    [
        {"hypergradient": "finite_difference"},
        {"hypergradient": "first_order"},
        {"scope": "head"},
        {"inner_steps": 0},
    ],
    ids=lambda update: next(iter(update.values())),
)
def test_the_ways_out_run_and_agree_with_the_same_layer_in_plain_torch(toys, way_out):
    settings = EXACT.model_copy(update=way_out)
    expected = gradient(toys, method_with(toys, Applied(lambda x: x**3)), settings)
    found = gradient(toys, method_with(toys, Applied(Cube.apply)), settings)
    # What rounds is the order of factors, which differences over 4e-10 of the weights' norm magnify.
    tolerance = 1e-5 if settings.hypergradient == "finite_difference" else 1e-6
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_torch_s_synchronised_batch_norm_is_refused_and_the_conversion_accepted(toys):
    method = nn.SyncBatchNorm.convert_sync_batchnorm(toys.method("byol"))
    GeSSL(method, GesslConfig())
    with pytest.raises(UsageError, match="synchronise_batch_norm"):
        GeSSL(method, GesslConfig(w_sigma=1.0))
    GeSSL(synchronise_batch_norm(method), EXACT)(toys.views()).loss.backward()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_backbone_is_refused_where_it_would_be_differentiated_twice(toys, in_place):
    method = toys.method("simclr")
    if in_place:
        method.backbone.compile(backend="aot_eager")
    else:
        method.backbone = torch.compile(method.backbone, backend="aot_eager")
    with pytest.raises(UsageError, match="compiled"):
        GeSSL(method, EXACT)


@pytest.mark.parametrize(
    "way_out", [{"hypergradient": "first_order"}, {"inner_steps": 0}, {"scope": "head"}], ids=str
)
def test_with_a_compiled_backbone_the_other_modes_give_the_eager_gradient(toys, way_out):
    settings = EXACT.model_copy(update={**way_out, "every": 2})
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    method = toys.method("byol")
    method.backbone.compile(backend=compiler)
    # The plain step comes first: what it compiles must serve the step with two backwards.
    GeSSL(method, settings)(toys.views(), step=1).loss.backward()
    method.zero_grad()
    found, expected = gradient(toys, method, settings), gradient(toys, toys.method("byol"), settings)
    assert compiler.frame_count > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


class Attention(nn.Module):
    """Self-attention over the pixels of a 6x6 image through torch's fused entry point."""

    num_features = 8

    def __init__(self, dropout):
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, 8), nn.Linear(8, 24)

    def forward(self, images):
        query, key, value = self.qkv(self.embed(images.flatten(2).mT).tanh()).chunk(3, dim=-1)
        # The fused kernels take heads; two of width 4.
        query, key, value = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2).tanh().mean(1)


def test_fused_attention_takes_the_math_path_in_exact_mode_and_gives_the_right_gradient(toys):
    exact = gradient(toys, toys.method("simclr", make_backbone=Attention), EXACT)
    differences = EXACT.model_copy(update={"hypergradient": "finite_difference"})
    expected = gradient(toys, toys.method("simclr", make_backbone=Attention), differences)
    assert (exact - expected).norm() <= 1e-4 * expected.norm()
