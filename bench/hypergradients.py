"""How near the cheaper hypergradients come to the exact one: `python -m bench.hypergradients [--seeds 5]
[--images 32] [--steps 20]`.

SimCLR on digits after a few plain steps, on the recipe's ResNet-18 and on the same network with GELU for
ReLU. Cosine and ratio of norms of the gradient of sigma, mode against exact; and of finite_difference alone
at other radii than its own.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import results
from bench.studies import summary, with_options
from fastgessl import pipelines
from fastgessl.build import build_loader
from fastgessl.config import Config, GesslConfig
from fastgessl.distributed import build_accelerator
from fastgessl.methods import Method, RunFacts, build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL
from fastgessl.objective.inner import RADII

NETWORKS = {"ReLU": nn.ReLU, "GELU": nn.GELU}
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
MODES = ("first_order", "finite_difference")
ALPHAS = (0.01, 0.03, 0.1)
CASES: dict[str, tuple[tuple[Literal["all", "head"], int], ...]] = {
    "float32": (("all", 1), ("all", 2), ("head", 1)),
    "float64": (("all", 1),),
}
"""(scope, K) by precision."""
TRIED_RADII = {"float32": (5e-3, 2e-3, 1e-3, 3e-4, 7e-5), "float64": (6e-6, 1.5e-8, 4e-10)}
"""In norms of the weights; 5e-3 and 6e-6 are the cube roots of the rounding errors, 3e-4 and 1.5e-8 the
square roots."""
TRIED_ALPHA = 0.03
LIKENESS = (", cosine", ", norm")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="images of a batch")
    parser.add_argument("--steps", type=int, default=20, help="plain steps before the gradients are compared")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args()
    config = with_options(
        "digits-simclr", {"train.batch_size": arguments.images, "train.device": "cpu", "log.trackers": ()}
    )
    measured = measure(config, range(arguments.seeds), arguments.steps)
    path = results.write("hypergradients", measured, arguments.out)
    for key, title in (
        ("rows", "mode against exact"),
        ("radii", f"finite_difference against exact, K = 1, alpha = {TRIED_ALPHA}"),
    ):
        Console(width=max(Console().width, 140)).print(
            _table(f"{title}, mean ± s.d. over {arguments.seeds} seeds", measured[key])
        )
    print(path)


def measure(config: Config, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Rows of modes and of radii, statistics over seeds; every contender sees the same weights and images."""
    per_seed: dict[str, list[list[Row]]] = {"rows": [], "radii": []}
    for seed in seeds:
        *before, views = _batches(config, seed, steps + 1)
        rows: dict[str, list[Row]] = {"rows": [], "radii": []}
        for network in NETWORKS:
            method = _trained(config, network, seed, before)
            for precision, dtype in PRECISIONS.items():
                case = {"network": network, "precision": precision}
                at = copy.deepcopy(method).to(dtype), [view.to(dtype) for view in views], precision
                rows["rows"] += [case | row for row in _modes(*at)]
                rows["radii"] += [case | row for row in _radii(*at)]
        for key, found in rows.items():
            per_seed[key].append(found)
    facts = {
        "model": config.model.model_dump(),
        "images": config.train.batch_size,
        "seeds": len(seeds),
        "steps": steps,
    }
    return facts | {key: _over_seeds(found) for key, found in per_seed.items()}


def _batches(config: Config, seed: int, count: int) -> list[list[Tensor]]:
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(seeded, Path(folder))
    images = pipelines.open_images("digits", split="train")
    assert images is not None
    return [list(batch.views) for batch in islice(build_loader(seeded, images, accelerator), count)]


def _trained(config: Config, network: str, seed: int, batches: Sequence[list[Tensor]]) -> Method:
    """After plain steps: timm starts a residual block's last scale at 0, which puts half of the ReLUs exactly
    on their kinks.
    """
    torch.manual_seed(seed)
    method = build_method(config.method, build_backbone(config.model), RunFacts())
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, NETWORKS[network]())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.03, momentum=0.9)
    for views in batches:
        GeSSL(method, GesslConfig())(views).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return method


def _modes(method: Method, views: list[Tensor], precision: str) -> Iterator[Row]:
    for (scope, inner_steps), alpha in product(CASES[precision], ALPHAS):
        settings = GesslConfig(inner_steps=inner_steps, inner_lr=alpha, scope=scope, w_ssl=0.0, w_sigma=1.0)
        exact = _gradient(method, settings, views)
        row: Row = {"scope": scope, "K": inner_steps, "alpha": alpha}
        for mode in MODES:
            row |= _likeness(
                mode, _gradient(method, settings.model_copy(update={"hypergradient": mode}), views), exact
            )
        yield row


def _radii(method: Method, views: list[Tensor], precision: str) -> Iterator[Row]:
    settings = GesslConfig(inner_steps=1, inner_lr=TRIED_ALPHA, w_ssl=0.0, w_sigma=1.0)
    exact = _gradient(method, settings, views)
    differences = settings.model_copy(update={"hypergradient": "finite_difference"})
    for radius in TRIED_RADII[precision]:
        with patch.dict(RADII, {PRECISIONS[precision]: radius}):
            yield {"radius": radius} | _likeness(
                "finite_difference", _gradient(method, differences, views), exact
            )


def _gradient(method: Method, settings: GesslConfig, views: list[Tensor]) -> Tensor:
    method = copy.deepcopy(method)
    GeSSL(method, settings)(views).loss.backward()
    slopes = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in method.parameters()
    ]
    return torch.cat([slope.flatten() for slope in slopes]).double()


def _likeness(name: str, found: Tensor, exact: Tensor) -> Row:
    cosine, ratio = torch.cosine_similarity(found, exact, dim=0), found.norm() / exact.norm()
    return {f"{name}, cosine": cosine.item(), f"{name}, norm": ratio.item()}


def _over_seeds(per_seed: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of one case each, whose likenesses are means and deviations."""
    return [
        {
            key: summary([row[key] for row in rows]) if key.endswith(LIKENESS) else value
            for key, value in rows[0].items()
        }
        for rows in zip(*per_seed, strict=True)
    ]


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ± {value['deviation']:.3f}"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
