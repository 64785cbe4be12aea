"""Does `make train` give a representation worth having? The digits recipe, over seeds, against raw pixels, no training, and plain SSL.

    python -m bench.digits [--seeds 5] [--recipe digits-simclr-gessl]

For each seed: GeSSL; plain at equal epochs; plain at equal seconds, whose epochs are multiplied by the ratio of step times, measured
side by side. Every run is the real command in a process of its own. Means over seeds, paired differences with 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench import results
from fastgessl import pipelines
from fastgessl.build import build_accelerator, build_loader, build_objective, make_plan
from fastgessl.config import Config
from fastgessl.objective import GeSSL
from fastgessl.recipes import load

MEASURES = (("linear", "linear"), ("few_labels", "10 labels a class"), ("knn", "k-NN"))
BASELINES = ("raw pixels", "untrained encoder")
TRAINED = ("GeSSL", "plain, equal epochs", "plain, equal seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", default="digits-simclr-gessl")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of bench/results")
    arguments = parser.parse_args()
    config = load(arguments.recipe).config
    epochs = arguments.epochs or config.train.epochs
    ratio = step_time_ratio(config)
    plan = {"GeSSL": (config.gessl.w_sigma, epochs), "plain, equal epochs": (0, epochs), "plain, equal seconds": (0, round(epochs * ratio))}
    seeds: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        rows: dict[str, Any] = {}
        for name, (w_sigma, length) in plan.items():
            run = _train(arguments.recipe, seed, w_sigma, length)
            rows |= {row: values for row, values in run["rows"].items() if row != "this run"} | {name: run["rows"]["this run"]}
        seeds.append({row: {key: values[key]["accuracy"] for key, _ in MEASURES} for row, values in rows.items()})
        print(f"seed {seed}: {seeds[-1]}", file=sys.stderr, flush=True)
    measured = {
        "recipe": arguments.recipe,
        "epochs": {name: length for name, (_, length) in plan.items()},
        "step_time_ratio": ratio,
        "seeds": seeds,
    }
    summary = {"mean": _means(seeds), "paired": _differences(seeds)}
    path = results.write(arguments.recipe, measured | summary, arguments.out)
    Console().print(_table(seeds, summary["paired"]))
    print(path)


def _train(recipe: str, seed: int, w_sigma: float, epochs: int) -> dict[str, Any]:
    """The evaluation of one run of the real command."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = {"train.seed": seed, "train.epochs": epochs, "gessl.w_sigma": w_sigma, "train.run_dir": run, "log.trackers": ""}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
        command = [sys.executable, "-m", "fastgessl", "train", recipe, *words]
        subprocess.run([*command, "--evaluate.tasks", *(key for key, _ in MEASURES)], check=True, stdout=subprocess.DEVNULL)
        return json.loads((run / "evaluation.json").read_text())


def step_time_ratio(config: Config, steps: int = 40) -> float:
    """Median time of `every` GeSSL steps over that of as many plain steps, taken in turns on the same views."""
    plain = config.model_copy(update={"gessl": config.gessl.model_copy(update={"w_sigma": 0.0})})
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(config, Path(folder))
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None
    loader = build_loader(config, images, accelerator)
    plan = make_plan(config, images, loader, accelerator)
    contenders = [build_objective(each, plan).to(accelerator.device) for each in (config, plain)]
    views = next(iter(loader)).views
    times: list[list[float]] = [[], []]
    for start in range(0, steps, config.gessl.every):
        for objective, spent in zip(contenders, times, strict=True):
            spent.append(sum(_step_seconds(objective, views, start + offset, accelerator) for offset in range(config.gessl.every)))
    return statistics.median(times[0]) / statistics.median(times[1])


def _step_seconds(objective: GeSSL, views: list[torch.Tensor], step: int, accelerator: Accelerator) -> float:
    started = time.perf_counter()
    objective(views, step).loss.backward()
    objective.zero_grad(set_to_none=True)
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _means(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every row and measure."""
    return {
        row: {
            key: {"mean": statistics.mean(seed[row][key] for seed in seeds), "deviation": _deviation([seed[row][key] for seed in seeds])}
            for key, _ in MEASURES
        }
        for row in (*BASELINES, *TRAINED)
    }


def _differences(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """GeSSL minus every other row, paired over seeds: mean and 95 % interval."""
    return {
        row: {key: _interval([seed["GeSSL"][key] - seed[row][key] for seed in seeds]) for key, _ in MEASURES}
        for row in (*BASELINES, *TRAINED[1:])
    }


def _interval(differences: list[float]) -> dict[str, float]:
    mean = statistics.mean(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * _deviation(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(seeds: list[dict[str, Any]], paired: dict[str, Any]) -> Table:
    table = Table(title=f"accuracy, %: mean ± s.d. over {len(seeds)} seeds; below it GeSSL minus this row, paired, with its 95 % interval")
    for column in ("row", *(name for _, name in MEASURES)):
        table.add_column(column)
    for row, values in _means(seeds).items():
        cells = []
        for key, _ in MEASURES:
            cell = f"{100 * values[key]['mean']:.1f} ± {100 * values[key]['deviation']:.1f}"
            if row in paired:
                difference = paired[row][key]
                cell += f"\n{100 * difference['mean']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
            cells.append(cell)
        table.add_row(row, *cells)
    return table


if __name__ == "__main__":
    main()
