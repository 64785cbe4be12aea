"""What does a GeSSL step cost, and how near do the cheaper hypergradients come to the exact one?"""

import copy
import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import peak_bytes
from bench.studies import prepared, summary, with_options
from fastgessl.config import GesslConfig, MethodConfig, ModelConfig
from fastgessl.methods import Method, RunFacts, build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL
from fastgessl.recipes import load

FIRST_ORDER = GesslConfig(inner_steps=1, hypergradient="first_order", w_sigma=1.0)
KEPT = GesslConfig(inner_steps=3, checkpoint_inner_steps=False, w_sigma=1.0)
CONTENDERS = {
    "plain": GesslConfig(),
    **{name: load(f"digits-simclr-gessl-{name}").config.gessl for name in ("fast", "head", "exact")},
    "K 1 first_order": FIRST_ORDER,
    "K 1 finite_difference": FIRST_ORDER.model_copy(update={"hypergradient": "finite_difference"}),
    "K 2 exact": GesslConfig(inner_steps=2, w_sigma=1.0),
    "K 3 exact": GesslConfig(inner_steps=3, w_sigma=1.0),
    "K 3 exact, graph kept": KEPT,
}
ALPHAS = (0.01, 0.03, 0.1)
MODES = ("first_order", "finite_difference")
NETWORKS = {"ReLU": nn.ReLU, "GELU": nn.GELU}


class Steps:
    """As many steps of an objective as belong together: sigma may come on every second one."""

    def __init__(self, settings: GesslConfig, model: ModelConfig, views: list[Tensor]) -> None:
        torch.manual_seed(0)
        method = build_method(MethodConfig(projector_hidden=512), build_backbone(model), RunFacts())
        self.objective, self.views = GeSSL(method, settings).to(views[0].device), views

    def __call__(self) -> None:
        for step in range(self.objective.settings.every):
            self.objective.zero_grad(set_to_none=True)
            self.objective(self.views, step).loss.backward()
        self.objective.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_cost(name: str, contend: Any, keep: Any, tiny: bool, device: str) -> None:
    """Seconds, operations and the peak bytes of live tensors of a step, float32.

    A view takes 72 MiB of ResNet-50's plain step, and up to 7.4 x that when K = 3 keeps its graph: 66 GiB at
    64 images.
    """
    if name == "resnet50" and device == "cpu":
        pytest.skip("ResNet-50 at 224 pixels needs a GPU")
    model, pixels, images = ModelConfig(name="resnet50"), 224, 64
    if name == "resnet18":
        width, images = (1.0, 256) if device == "cuda" else (0.125 if tiny else 0.25, 2 if tiny else 16)
        model, pixels = ModelConfig(stem="small", width=width), 16 if tiny else 32
    views = [torch.randn(images, 3, pixels, pixels, device=device) for _ in range(2)]
    steps = {one: Steps(settings, model, views) for one, settings in CONTENDERS.items()}
    case = {"model": name, "width": model.width, "pixels": pixels, "images": images}
    calls = {one: settings.every for one, settings in CONTENDERS.items()}
    rows = contend(case, steps, calls)
    for one in (one for one in rows if "seconds" in rows[one]):
        with FlopCounterMode(display=False) as counter:
            steps[one]()
        live = peak_bytes(steps[one], steps[one].objective)
        rows[one] |= {"operations": counter.get_total_flops() / calls[one], "live_bytes": live}
        for key in ("operations", "live_bytes"):
            rows[one][f"{key}_ratio"] = rows[one][key] / rows["plain"][key]
        keep(case, rows)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_likeness(network: str, dtype: torch.dtype, benchmark: Any, keep: Any, tiny: bool) -> None:
    """Cosine and ratio of norms of the gradient of sigma, mode against exact, mean and deviation over seeds:
    SimCLR on digits after plain steps, on the recipe's ResNet-18 and on the same network with GELU for ReLU.
    """
    rows: dict[str, Any] = defaultdict(lambda: defaultdict(list))

    def measure() -> None:
        for seed in range(2 if tiny else 5):
            method, views = trained(network, seed, tiny)
            method.to(dtype)
            for scope, steps in (("head", 1),) if tiny else (("all", 1), ("all", 2), ("head", 1)):
                for alpha in ALPHAS[:1] if tiny else ALPHAS:
                    settings = GesslConfig(
                        inner_steps=steps, inner_lr=alpha, scope=scope, w_ssl=0.0, w_sigma=1.0
                    )
                    row = rows[f"{scope}, K {steps}, alpha {alpha}"]
                    for name, value in likeness(method, settings, [view.to(dtype) for view in views]).items():
                        row[name].append(value)

    benchmark.pedantic(measure)
    case = {"what": "likeness to exact", "network": network, "precision": str(dtype).removeprefix("torch.")}
    keep(case, {name: {key: summary(values) for key, values in row.items()} for name, row in rows.items()})


def likeness(method: Method, settings: GesslConfig, views: list[Tensor]) -> dict[str, float]:
    """Of each mode's gradient of sigma to that of exact mode."""
    exact, found = gradient(method, settings, views), {}
    for mode in MODES:
        slope = gradient(method, settings.model_copy(update={"hypergradient": mode}), views)
        found[f"{mode}, cosine"] = torch.cosine_similarity(slope, exact, dim=0).item()
        found[f"{mode}, norm"] = (slope.norm() / exact.norm()).item()
    return found


def gradient(method: Method, settings: GesslConfig, views: list[Tensor]) -> Tensor:
    method = copy.deepcopy(method)
    GeSSL(method, settings)(views).loss.backward()
    slopes = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in method.parameters()
    ]
    return torch.cat([slope.flatten() for slope in slopes]).double()


def trained(network: str, seed: int, tiny: bool) -> tuple[Method, list[Tensor]]:
    """A method after plain steps, and views to compare gradients on. timm starts a residual block's last
    scale at 0, which puts half of the ReLUs exactly on their kinks.
    """
    options = {"train.batch_size": 8 if tiny else 32, "train.device": "cpu", "train.seed": seed}
    config = with_options(
        "digits-simclr", options | {"log.trackers": (), "model.width": 0.125 if tiny else 0.25}
    )
    batches = itertools.islice(prepared(config)[2], 3 if tiny else 21)
    *before, views = [batch.views for batch in batches]
    torch.manual_seed(seed)
    method = build_method(config.method, build_backbone(config.model), RunFacts())
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, NETWORKS[network]())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.03, momentum=0.9)
    for batch in before:
        GeSSL(method, GesslConfig())(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return method, list(views)
