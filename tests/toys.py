"""Methods small enough for float64, finite differences and formulas written out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.config import MethodConfig
from fastgessl.methods import Method, RunFacts, Similarity, build_method


def toy_backbone(norm: bool = False) -> nn.Module:
    """(B, 3, 2, 2) -> (B, 6): a linear layer, and a batch norm if asked for."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), *([nn.BatchNorm1d(6)] if norm else []))
    backbone.num_features = 6
    return backbone


def method_config(name: str, **options: Any) -> MethodConfig:
    """Narrow heads. Options of the method alone go to the section of its name."""
    given = {"name": name, "projector_hidden": 8, "projector_out": 4, "predictor_hidden": 8}
    own = type(getattr(MethodConfig(), name)).model_fields if name in MethodConfig.model_fields else {}
    given |= {key: value for key, value in options.items() if key not in own}
    section = {key: value for key, value in options.items() if key in own}
    return MethodConfig.model_validate(given | ({name: section} if section else {}))


def toy_method(
    name: str, facts: RunFacts | None = None, backbone: nn.Module | None = None, **options: Any
) -> Method:
    """The method in float64, over a linear backbone unless another is given, alike at every call."""
    torch.manual_seed(0)
    made = build_method(
        method_config(name, **options), toy_backbone() if backbone is None else backbone, facts or RunFacts()
    )
    return made.double()


def toy_images(seed: int = 0, views: int = 2, images: int = 5) -> list[Tensor]:
    """Views (N, 3, 2, 2); of the same seed, the first ones are alike."""
    torch.manual_seed(seed)
    return [torch.randn(images, 3, 2, 2, dtype=torch.float64) for _ in range(views)]


def unit(rows: Tensor) -> Tensor:
    return normalize(rows, dim=-1)


def logits(pi: Similarity) -> Tensor:
    """(M, K), the table whose row softmax is π."""
    return pi.query @ pi.key.T / pi.temperature


def trained(method: Method, steps: int, first: int = 0, views: int = 2) -> list[tuple[Any, Any]]:
    """SGD steps of two micro-batches; outputs and targets of each."""
    optimizer, seen = torch.optim.SGD(method.parameters(), lr=0.1), []
    for step in range(first, first + steps):
        passes = []
        for part in range(2):
            images = toy_images(2 * step + part, views)
            targets = method.targets(images)
            passes.append((method(images), targets))
            method.loss(*passes[-1]).backward()
        for parameter in method.frozen(step):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        method.update_state(passes, step)
        seen += passes
    return seen


def assert_same_loss(
    found: Tensor,
    expected: Tensor,
    operands: Sequence[Tensor],
    *,
    rtol: float = 1e-12,
    slopes: tuple[float, float] = (1e-10, 1e-14),
) -> None:
    """Two losses agree, and so do their gradients to each operand, within (rtol, atol) `slopes`."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    first, second = (torch.autograd.grad(loss, operands, retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(first, second, rtol=slopes[0], atol=slopes[1])
