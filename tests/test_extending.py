"""The worked examples of docs/extending.md: one file and one recipe make a method, and it is the paper's; one
file makes an evaluation task; three places make a view parameter.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toys import assert_same_loss, toy_backbone, toy_images, toy_method

from fastgessl.config import GesslConfig
from fastgessl.methods import METHODS, Outputs
from fastgessl.objective import GeSSL

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE, TASK = re.findall(r"^```py\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
CHANGES = re.findall(r"^`(\S+)`\n\n```diff\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
RECIPE = re.search(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1]


@pytest.fixture
def simsiam(monkeypatch):
    """The example's class, registered for one test."""
    monkeypatch.setitem(METHODS, "simsiam", None)
    del METHODS["simsiam"]
    scope: dict[str, object] = {"__name__": "simsiam"}
    exec(compile(CODE, "simsiam.py", "exec"), scope)
    return scope["SimSiam"]


def toy():
    return toy_method("simsiam", backbone=toy_backbone(norm=True))


def test_its_loss_and_gradient_are_those_of_the_paper_s_algorithm(simsiam):
    torch.manual_seed(0)
    predictions, projections = (
        torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    found = toy().loss(Outputs(projections, projections, predictions))
    unit, other = (rows / rows.norm(dim=-1, keepdim=True) for rows in (predictions, projections.detach()))
    expected = -(unit[0] * other[1]).sum(1).mean() / 2 - (unit[1] * other[0]).sum(1).mean() / 2
    assert_same_loss(found, expected, [predictions])
    assert torch.autograd.grad(found, projections, allow_unused=True) == (None,)


@pytest.mark.parametrize("scope", ["all", "head"])
def test_it_trains_under_exact_inner_steps(simsiam, scope):
    method, settings = toy(), GesslConfig(inner_steps=1, inner_lr=0.1, scope=scope, w_sigma=1.0)
    result = GeSSL(method, settings)(toy_images())
    result.loss.backward()
    assert result.metrics["sigma"] > 0 and all(
        parameter.grad is not None for parameter in method.parameters()
    )


def test_its_recipe_names_the_source_of_every_number():
    recipe = yaml.safe_load(RECIPE)
    assert set(recipe["config"]) <= set(recipe["source"]) and recipe["config"]["method"]["name"] == "simsiam"


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the source with the method's file and recipe, the task's file and the view parameter."""
    copy = tmp_path_factory.mktemp("extended")
    for folder in ("fastgessl", "kernels", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    (copy / "fastgessl" / "methods" / "simsiam.py").write_text(CODE)
    (copy / "fastgessl" / "recipes" / "methods" / "simsiam.yaml").write_text(RECIPE)
    (copy / "fastgessl" / "evaluate" / "tasks" / "nearest_mean.py").write_text(TASK)
    for file, change in CHANGES:
        lines, source = change.splitlines(keepends=True), (copy / file).read_text()
        before, after = ("".join(line[1:] for line in lines if line[0] in sides) for sides in (" -", " +"))
        assert source.count(before) == 1
        (copy / file).write_text(source.replace(before, after))
    return copy


def command(source: Path, *words: str) -> str:
    """What `fastgessl WORDS` prints, run from a copy of the source."""
    return python(source, "-m", "fastgessl", *words)


def python(source: Path, *words: str) -> str:
    """What `python WORDS` prints, run from a copy of the source."""
    outcome = subprocess.run(
        [sys.executable, *words],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_a_method_a_task_and_a_view_parameter_work_from_the_command_to_the_report(extended):
    options = (
        "--train.max_steps 2 --train.batch_size 32 --model.width 0.125 --views.size 8 --views.crop_room 0 "
        "--train.run_dir run"
    )
    tasks = ("--evaluate.tasks", "knn", "nearest_mean")

    printed = command(extended, "train", "digits-simsiam-gessl", *options.split(), *tasks)
    command(extended, "report", "run")

    assert "crop_room: 0.0" in (extended / "run" / "config.yaml").read_text()
    assert (extended / "run" / "encoder.safetensors").is_file() and "GeSSL over simsiam" in printed
    measured = json.loads((extended / "run" / "evaluation.json").read_text())["rows"]["raw pixels"]
    accuracy = f"{100 * measured['nearest_mean']['accuracy']:.1f}"
    assert measured["nearest_mean"]["classes"] == 10 and float(accuracy) > 80
    table = printed[printed.index("nearest") :]
    assert re.search(rf"raw pixels \(192\) +{accuracy}\b", table)
    page = (extended / "run" / "report.html").read_text()
    assert "<th>nearest<br>mean<br>%</th>" in page
    assert f'<th scope="row">raw pixels (192)</th><td>{accuracy}</td>' in page


CROPS = """
import numpy as np
from fastgessl.config import ViewsConfig
from fastgessl.pipelines import view_preset
from fastgessl.pipelines.draws import Draws
views = view_preset(**dict(ViewsConfig(crop_room=0)))
place, size = np.arange(64), np.full(64, 99)
crops = np.concatenate([drawn.crop.numpy() for drawn in Draws(views, 0)(place, size, size, 0)])
print(np.abs(crops[:, :2] + crops[:, 2:] / 2 - 49.5).max())
"""


def test_three_places_make_a_view_parameter(extended):
    assert len(CHANGES) == 3 and float(python(extended, "-c", CROPS)) <= 0.5
