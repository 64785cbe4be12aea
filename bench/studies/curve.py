"""How does sigma change over training? With GeSSL and plainly, at constant alpha on fixed held-out images.

python -m bench.studies.curve [--preset fast] [--seeds 5] [--steps 120]
"""

import statistics
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from bench import results
from bench.studies import prepared, summary, with_options
from fastgessl.build import build_objective, make_plan
from fastgessl.config import Config, GesslConfig
from fastgessl.evaluate import effective_rank
from fastgessl.objective import GeSSL, measure_sigma
from fastgessl.objective.task import rank_local_task
from fastgessl.schedules import learning_rate
from fastgessl.training.optimizers import build_optimizer

MEASURING = GesslConfig(inner_lr=0.01, w_sigma=1.0)
"""How sigma is measured, for every model and at every time: K = 0, lambda = 1, alpha = 0.01."""
HELD_OUT_BATCHES = 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--preset", default="fast", help="what is trained beside plain SimCLR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run")
    arguments = parser.parse_args(argv)
    # A narrower network and smaller batches than the recipe's.
    options = {"model.width": 0.125, "train.batch_size": 64, "train.max_steps": arguments.steps}
    options |= {"train.device": "cpu", "schedule.warmup_epochs": 1.0, "log.trackers": ()}
    runs: dict[str, list[list[dict[str, float]]]] = {"GeSSL": [], "plain": []}
    for seed, name in ((seed, name) for seed in range(arguments.seeds) for name in runs):
        plain = {"gessl.w_sigma": 0.0} if name == "plain" else {}
        recipe = f"digits-simclr-gessl-{arguments.preset}"
        config = with_options(recipe, {**options, **plain, "train.seed": seed})
        runs[name].append(list(trained(config, max(arguments.steps // 6, 1))))
    for points in zip(*runs["GeSSL"], *runs["plain"], strict=True):
        own, other = points[: arguments.seeds], points[arguments.seeds :]
        for key in ("sigma", "effective_rank", "loss_ssl"):
            print(f"step {own[0]['step']}, {key}: {summary([point[key] for point in own])}, plain", end=" ")
            print(summary([point[key] for point in other]))
    found = {"preset": arguments.preset, "measuring": MEASURING.model_dump(), "steps": arguments.steps}
    print(results.write("gessl-curve", found | {"runs": runs}, arguments.out))


def trained(config: Config, every: int) -> Iterator[dict[str, float]]:
    """Train, and measure before the first step and after every `every`-th."""
    accelerator, images, loader = prepared(config)
    # The same held-out views whatever the seed of the run.
    fixed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 12345})})
    tasks = [batch.views for batch in islice(prepared(fixed, "test")[2], HELD_OUT_BATCHES)]
    plan = make_plan(config, images, loader, accelerator)
    objective = build_objective(config, plan)
    optimizer = build_optimizer(objective, config.optim, plan.peak_learning_rate)
    warmup = round(config.schedule.warmup_epochs * plan.steps_per_epoch)
    rates = learning_rate(plan.peak_learning_rate, plan.total_steps, warmup_steps=warmup)
    batches = chain.from_iterable(repeat(loader))
    yield measured(objective, tasks, 0)
    for step in range(plan.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        result = objective(next(batches).views, step)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.method.update_state([(result.outputs, result.targets)], step)
        if (step + 1) % every == 0:
            yield measured(objective, tasks, step + 1)


def measured(objective: GeSSL, tasks: list[list[Tensor]], step: int) -> dict[str, float]:
    """Means over the held-out batches of sigma and of the SSL loss; effective rank of the frozen features."""
    method = objective.method
    sigma = statistics.mean(measure_sigma(method, MEASURING, views) for views in tasks)
    with torch.no_grad():
        held_out = [rank_local_task(method, views, None, "all") for views in tasks]
        loss = statistics.mean(task.loss(task.outputs({})).item() for task in held_out)
        method.eval()
        features = torch.cat([method.backbone(views[0]) for views in tasks])
        method.train()
    return {"step": step, "sigma": sigma, "effective_rank": effective_rank(features), "loss_ssl": loss}


if __name__ == "__main__":
    main()
