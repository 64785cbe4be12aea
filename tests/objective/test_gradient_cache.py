"""Gradient caching: the step of the whole batch, to rounding, in the memory of a chunk."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import METHOD, run_steps, small_config, start
from smooth_toys import gradients
from tiny_run import read_lines
from torch import nn

from bench.memory import device_peak_bytes
from fastgessl.config import GesslConfig, MethodConfig, UsageError
from fastgessl.methods import METHODS, Outputs, RunFacts, build_method
from fastgessl.methods.simclr import SimCLR
from fastgessl.objective import GeSSL
from fastgessl.objective.gradient_cache import CachedObjective


def narrow_backbone(dropout: float) -> nn.Module:
    """(B, 3, 6, 6) -> (B, 6), on which float32 has the digits that are asked for."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    backbone.num_features = 6
    return backbone


def batch(images: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(images, 3, 6, 6, dtype=dtype) for _ in range(2)]


def make(name: str, *, batch_norm: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
    """A method with the same weights at every call, and a queue with something in it."""
    torch.manual_seed(0)
    facts = RunFacts(total_steps=10, classes=4)
    method = build_method(MethodConfig(name=name, **METHOD), narrow_backbone(dropout), facts)
    if not batch_norm:
        without_batch_norm(method)
    for _, buffer in method.named_buffers():
        if buffer.is_floating_point() and buffer.dim() == 3:
            buffer.normal_()
    return method.to(dtype)


def without_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features, affine=child.affine))
        without_batch_norm(child)


def worst(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_without_batch_norm_the_step_is_that_of_the_whole_batch(name, chunk, dtype):
    views, labels = batch(13, dtype), torch.arange(13) % 4
    plain, cached = (make(name, dtype=dtype) for _ in range(2))
    expected, found = (
        GeSSL(plain, GesslConfig())(views, labels=labels),
        CachedObjective(cached, GesslConfig(), chunk)(views, labels=labels),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    expected.loss.backward()
    found.loss.backward()
    assert worst(gradients(cached), gradients(plain)) <= tolerance
    torch.testing.assert_close(found.metrics, expected.metrics, rtol=10 * tolerance, atol=tolerance)
    plain.update_state([(expected.outputs, expected.targets)], 0)
    cached.update_state([(found.outputs, found.targets)], 0)
    torch.testing.assert_close(cached.state_dict(), plain.state_dict(), rtol=10 * tolerance, atol=tolerance)


class InChunks(nn.Module):
    """A module that is called on two parts of its input, one after the other, with one graph over both."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, views):
        parts = [self.inner([view.tensor_split(2)[place] for view in views]) for place in range(2)]
        return Outputs(
            *(
                torch.cat([getattr(part, name) for part in parts], dim=1)
                for name in ("features", "projections")
            )
        )


def test_with_batch_norm_each_chunk_has_its_own_statistics_and_both_passes_agree():
    views = batch(12)
    plain, cached = (make("simclr", batch_norm=True) for _ in range(2))
    plain.loss(InChunks(plain)(views)).backward()
    CachedObjective(cached, GesslConfig(), chunk=6)(views).loss.backward()
    assert worst(gradients(cached), gradients(plain)) <= 1e-12
    torch.testing.assert_close(cached.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    whole = make("simclr", batch_norm=True)
    GeSSL(whole, GesslConfig())(views).loss.backward()
    assert (
        worst(gradients(cached), gradients(whole)) > 1e-3
    )  # as documented: not the statistics of the whole batch


def test_dropout_falls_on_the_same_units_in_both_passes():
    views = batch(12)
    method = make("simclr", dropout=0.5)
    objective = CachedObjective(method, GesslConfig(), chunk=4)
    torch.manual_seed(7)
    result = objective(views)
    result.loss.backward()
    direction = torch.randn_like(method.backbone[0].weight)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            method.backbone[0].weight.add_(sign * 1e-6 * direction)
            torch.manual_seed(7)
            losses.append(objective(views).loss.item())
            method.backbone[0].weight.sub_(sign * 1e-6 * direction)
    slope = (method.backbone[0].weight.grad * direction).sum().item()
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_under_autocast_the_second_pass_has_a_graph_and_the_gradient_of_the_first():
    views = batch(12, torch.float32)
    plain, cached = (make("simclr", dtype=torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (
            GeSSL(plain, GesslConfig())(views),
            CachedObjective(cached, GesslConfig(), chunk=5)(views),
        )
    expected.loss.backward()
    found.loss.backward()
    assert gradients(cached).norm() > 0
    assert worst(gradients(cached), gradients(plain)) <= 0.05


class Kept:
    """A tensor that autograd keeps for a backward, counted for as long as it does."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.now += tensor.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        Kept.now -= self.tensor.nbytes


def most_kept(images: int, chunk: int) -> int:
    """Peak of the bytes that autograd keeps during a step."""
    method = make("simclr", dtype=torch.float32)
    objective = CachedObjective(method, GesslConfig(), chunk) if chunk else GeSSL(method, GesslConfig())
    views = batch(images, torch.float32)
    Kept.now = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        objective(views).loss.backward()
    return Kept.most


def test_what_autograd_keeps_grows_with_the_chunk_and_not_with_the_batch():
    plain, larger = most_kept(256, 0), most_kept(512, 0)
    cached, larger_cached = most_kept(256, 8), most_kept(512, 8)
    assert larger > 1.9 * plain
    # What stays are the embeddings and the loss over them.
    assert larger_cached - cached < 0.1 * (larger - plain)
    assert cached < plain / 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("images", [1024, pytest.param(65_536, marks=pytest.mark.slow)])
def test_a_step_of_65_536_images_runs_in_the_memory_of_its_embeddings(tmp_path, images):
    random, dim = np.random.default_rng(0), 128
    np.savez(
        tmp_path / "images.npz",
        train_x=random.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8),
        train_y=np.arange(images) % 4,
    )
    sections = {
        "method": {"projector_hidden": 64, "projector_out": dim},
        "train": {
            "batch_size": images,
            "accumulate": 1,
            "epochs": 1,
            "max_steps": 1,
            "gradient_cache": images // 64,
        },
    }
    training = start(small_config(tmp_path / "images.npz", **sections), tmp_path / "run")
    weights = [training.method.backbone.conv1[0].weight, training.method.projector[0].weight]
    before = [weight.clone() for weight in weights]
    began, computing = time.monotonic(), time.process_time()
    taken = device_peak_bytes(lambda: run_steps(training, tmp_path / "run"))
    assert taken is not None
    seconds, computing = time.monotonic() - began, time.process_time() - computing
    print(
        f"{images} images, {dim} dimensions: {seconds:.0f} s, {computing:.0f} s of them computing, "
        f"{taken / 2**20:.0f} MiB at most"
    )
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    # Cosines in [-1, 1] at a temperature of 0.3 keep a row's loss, over all other rows, within 2 / 0.3 of the
    # logarithm of their number.
    assert abs(line["loss"] - np.log(2 * images - 1)) < 2 / 0.3
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    # Found with 65,536: 768 MiB. The views are 96 MiB and their projections 64; the table of similarities
    # would be 65,536.
    assert taken < 2**30


def test_gessl_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="mini-batch is a task"):
        CachedObjective(make("simclr", batch_norm=True), GesslConfig(w_sigma=1.0), chunk=4)


class OneForAll(SimCLR):
    def targets(self, views, labels=None):
        return views[0].mean()


@dataclass(frozen=True)
class Further(Outputs):
    brightness: torch.Tensor | None = None


class OfOnesOwn(SimCLR):
    def forward(self, views=None, *, features=None):
        own = vars(super().forward(views, features=features))
        return Further(**own, brightness=views[0].mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OneForAll, "gradient caching would change the loss"),
        (OfOnesOwn, r"takes Further\.brightness for a weight"),
    ],
)
def test_targets_of_a_whole_chunk_and_outputs_in_a_field_of_ones_own_are_refused(monkeypatch, kind, said):
    monkeypatch.setitem(METHODS, "simclr", kind)
    with pytest.raises(UsageError, match=said):
        CachedObjective(make("simclr"), GesslConfig(), chunk=4)(batch(8))
