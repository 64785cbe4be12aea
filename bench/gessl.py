"""What GeSSL costs, and what sigma does over training.

    python -m bench.gessl [--images 16] [--rounds 5]          operations, seconds and peak bytes of a step, x a plain step
    python -m bench.gessl --curve [--seeds 5] [--steps 120]   sigma at constant alpha on fixed held-out images, beside plain SSL

Time ratios are medians over rounds in which a contender and the plain step take turns: a shared machine is
slow for both alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import results
from bench.attempts import NO_ROOM, NO_TIME, attempt
from bench.memory import peak_bytes
from bench.timing import ratio, timed
from fastgessl import pipelines
from fastgessl.build import build_loader, build_objective, make_plan
from fastgessl.config import Config, GesslConfig, MethodConfig, ModelConfig
from fastgessl.distributed import build_accelerator
from fastgessl.evaluate import effective_rank
from fastgessl.methods import RunFacts, build_method
from fastgessl.models import build_backbone
from fastgessl.objective import GeSSL, measure_sigma
from fastgessl.objective.task import rank_local_task
from fastgessl.recipes import load
from fastgessl.schedules import learning_rate
from fastgessl.training.optimizers import build_optimizer

PRESETS = {name: load(f"digits-simclr-gessl-{name}").config.gessl for name in ("fast", "head", "exact")}
CONTENDERS = {
    "plain": GesslConfig(),
    "fast": PRESETS["fast"],
    "head": PRESETS["head"],
    "K 1 first_order": GesslConfig(inner_steps=1, hypergradient="first_order", w_sigma=1.0),
    "K 1 finite_difference": GesslConfig(inner_steps=1, hypergradient="finite_difference", w_sigma=1.0),
    "exact": PRESETS["exact"],
    "K 2 exact": GesslConfig(inner_steps=2, w_sigma=1.0),
    "K 3 exact": GesslConfig(inner_steps=3, w_sigma=1.0),
    "K 3 exact, graph kept": GesslConfig(inner_steps=3, checkpoint_inner_steps=False, w_sigma=1.0),
}
SMALL = ModelConfig(name="resnet18", stem="small", width=0.25)
MEASURING = GesslConfig(inner_lr=0.01, w_sigma=1.0)
"""How the curves measure sigma, for every model and at every time: K = 0, lambda = 1, alpha = 0.01."""
HELD_OUT_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--curve", action="store_true", help="sigma over training instead of the cost of a step"
    )
    parser.add_argument("--images", type=int, default=16, help="cost: images of a step")
    parser.add_argument("--rounds", type=int, default=5, help="cost: how often each contender is timed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="curve: optimiser steps of a run")
    parser.add_argument(
        "--preset", default="fast", choices=PRESETS, help="curve: what is trained beside plain SSL"
    )
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args()
    if arguments.curve:
        measured = curves(arguments.preset, arguments.seeds, arguments.steps)
        name, table = "gessl-curve", _curve_table(measured)
    else:
        measured = cost(arguments.images, arguments.rounds)
        name, table = "gessl", _cost_table(measured)
    path = results.write(name, measured, arguments.out)
    Console().print(table)
    print(path)


def cost(images: int, rounds: int, model: ModelConfig = SMALL, pixels: int = 32) -> dict[str, Any]:
    """Operations, seconds and peak live bytes of a step, averaged over `every` steps (bytes: of the dearest)."""
    *_, measured = costs(images, rounds, model, pixels, math.inf)
    return measured


def costs(
    images: int, rounds: int, model: ModelConfig, pixels: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """`cost`, with one contender more each time, until time.perf_counter() is at `deadline`; plain comes
    first.

    A contender for which a device has no room is absent; one that fails in another way is an error, after
    which the others go on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = [torch.randn(images, 3, pixels, pixels, device=device) for _ in range(2)]
    plain = _resnet(CONTENDERS["plain"], model).to(device)
    rows: dict[str, dict[str, Any]] = {}
    for name, settings in CONTENDERS.items():
        if time.perf_counter() > deadline:
            rows[name] = NO_TIME
        elif name != "plain" and "seconds" not in rows["plain"]:
            rows[name] = {"absent": "there is no plain step to compare with"}
        else:
            objective = plain if name == "plain" else _resnet(settings, model).to(device)
            work = partial(_cost_row, objective, plain, views, rounds, rows.get("plain"))
            rows[name] = attempt(work, () if name == "plain" else NO_ROOM)
        case = {
            "model": model.model_dump(),
            "projector": "512-128",
            "pixels": pixels,
            "images": images,
            "rounds": rounds,
        }
        yield case | {"rows": dict(rows)}


def _cost_row(
    objective: GeSSL, plain: GeSSL, views: list[Tensor], rounds: int, beside: dict[str, Any] | None
) -> dict[str, Any]:
    """One contender, its rounds in turns with the plain step's; `beside` is that one's row, None for itself."""
    with FlopCounterMode(display=False) as counter:
        _steps(objective, views)
    operations = counter.get_total_flops() / objective.settings.every
    peak = peak_bytes(lambda: _steps(objective, views), objective)
    contenders = {"plain": plain, "": objective} if beside else {"plain": plain}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken: dict[str, float] = {}
            timed(taken, "", lambda contender=contender: _steps(contender, views))  # type: ignore[misc]
            times[name].append(taken[""] / contender.settings.every)
    own = times["" if beside else "plain"]
    row = {
        "operations": operations,
        "peak_bytes": peak,
        "seconds": statistics.median(own),
        "seconds_ratio": ratio(own, times["plain"]),
    }
    shared = beside or row
    return row | {
        "operations_ratio": operations / shared["operations"],
        "peak_ratio": peak / shared["peak_bytes"],
    }


def _resnet(settings: GesslConfig, model: ModelConfig) -> GeSSL:
    torch.manual_seed(0)
    backbone = build_backbone(model)
    return GeSSL(build_method(MethodConfig(projector_hidden=512), backbone, RunFacts()), settings)


def _steps(objective: GeSSL, views: list[Tensor]) -> None:
    for step in range(objective.settings.every):
        objective.zero_grad(set_to_none=True)
        objective(views, step).loss.backward()
    objective.zero_grad(set_to_none=True)


def curves(preset: str, seeds: int, steps: int) -> dict[str, Any]:
    """Held-out sigma, effective rank and SSL loss along runs with and without sigma in the objective."""
    every = max(steps // 6, 1)
    runs: dict[str, list[list[dict[str, float]]]] = {"GeSSL": [], "plain": []}
    for seed in range(seeds):
        for name, points in runs.items():
            points.append(list(_run(_configuration(preset, seed, steps, plain=name == "plain"), every)))
    return {"preset": preset, "measuring": MEASURING.model_dump(), "steps": steps, "runs": runs}


def _configuration(preset: str, seed: int, steps: int, *, plain: bool) -> Config:
    """The digits recipe on a narrower network and smaller batches."""
    config = load(f"digits-simclr-gessl-{preset}").config
    parts = {
        "model": {"width": 0.125},
        "train": {"batch_size": 64, "seed": seed, "max_steps": steps, "device": "cpu"},
        "schedule": {"warmup_epochs": 1.0},
        "gessl": {"w_sigma": 0.0} if plain else {},
        "log": {"trackers": ()},
    }
    return config.model_copy(
        update={part: getattr(config, part).model_copy(update=changed) for part, changed in parts.items()}
    )


def _run(config: Config, every: int) -> Iterator[dict[str, float]]:
    """Train, and measure before the first step and after every `every`-th."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(config, Path(folder))
    images, held_out = (pipelines.open_images("digits", split=split) for split in ("train", "test"))
    assert images is not None and held_out is not None
    loader = build_loader(config, images, accelerator)
    # The same held-out views whatever the seed of the run.
    fixed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 12345})})
    tasks = [batch.views for batch in islice(build_loader(fixed, held_out, accelerator), HELD_OUT_BATCHES)]
    plan = make_plan(config, images, loader, accelerator)
    objective = build_objective(config, plan)
    optimizer = build_optimizer(objective, config.optim, plan.peak_learning_rate)
    warmup = round(config.schedule.warmup_epochs * plan.steps_per_epoch)
    rates = learning_rate(plan.peak_learning_rate, plan.total_steps, warmup_steps=warmup)
    batches = (batch for _ in iter(int, 1) for batch in loader)
    yield _measured(objective, tasks, 0)
    for step in range(plan.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        result = objective(next(batches).views, step)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.method.update_state([(result.outputs, result.targets)], step)
        if (step + 1) % every == 0:
            yield _measured(objective, tasks, step + 1)


def _measured(objective: GeSSL, tasks: list[list[Tensor]], step: int) -> dict[str, float]:
    """All of it on the held-out batches: means of sigma and of the SSL loss, effective rank of the frozen
    features.
    """
    method = objective.method
    sigma = statistics.mean(measure_sigma(method, MEASURING, views) for views in tasks)
    with torch.no_grad():
        held_out = [rank_local_task(method, views, None, "all") for views in tasks]
        loss = statistics.mean(task.loss(task.outputs({})).item() for task in held_out)
        method.eval()
        features = torch.cat([method.backbone(views[0]) for views in tasks])
        method.train()
    return {"step": step, "sigma": sigma, "effective_rank": effective_rank(features), "loss_ssl": loss}


def _cost_table(measured: dict[str, Any]) -> Table:
    table = Table(title=f"x a plain step: {measured['model']}, {measured['images']} images of 32 pixels")
    for column in ("", "operations", "seconds", "peak bytes", "seconds, absolute", "peak, MiB"):
        table.add_column(column)
    for name, row in measured["rows"].items():
        if "seconds" not in row:
            table.add_row(name, row.get("absent", row.get("error")))
            continue
        ratios = [f"{row[key]:.2f}" for key in ("operations_ratio", "seconds_ratio", "peak_ratio")]
        table.add_row(name, *ratios, f"{row['seconds']:.3f}", f"{row['peak_bytes'] / 2**20:.1f}")
    return table


def _curve_table(measured: dict[str, Any]) -> Table:
    runs = measured["runs"]
    seeds = len(runs["plain"])
    table = Table(
        title=f"mean ± s.d. over {seeds} seeds; sigma in nats at constant alpha on fixed held-out images; "
        f"{measured['preset']}"
    )
    keys = ("sigma", "effective_rank", "loss_ssl")
    for column in ("step", *(f"{key}, {name}" for key in keys for name in runs)):
        table.add_column(column)
    for i, point in enumerate(runs["plain"][0]):
        cells = [_spread([run[i][key] for run in runs[name]]) for key in keys for name in runs]
        table.add_row(str(point["step"]), *cells)
    return table


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values) if len(values) > 1 else 0:.1g}"


if __name__ == "__main__":
    main()
