"""The worked example of docs/extending.md: one file and one recipe make a method, and it is the paper's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from fastgessl.config import GesslConfig, MethodConfig
from fastgessl.methods import METHODS, Outputs, RunFacts, build_method
from fastgessl.objective import GeSSL

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE, RECIPE = (
    re.search(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1] for kind in ("py", "yaml")
)


@pytest.fixture
def simsiam(monkeypatch):
    """The example's class, registered for one test."""
    monkeypatch.setitem(METHODS, "simsiam", None)
    del METHODS["simsiam"]
    scope: dict[str, object] = {"__name__": "simsiam"}
    exec(compile(CODE, "simsiam.py", "exec"), scope)
    return scope["SimSiam"]


def toy():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    backbone.num_features = 6
    return build_method(
        MethodConfig(name="simsiam", projector_hidden=8, projector_out=4, predictor_hidden=8),
        backbone,
        RunFacts(),
    ).double()


def test_its_loss_and_gradient_are_those_of_the_paper_s_algorithm(simsiam):
    torch.manual_seed(0)
    predictions, projections = (
        torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    found = toy().loss(Outputs(projections, projections, predictions))
    unit, other = (rows / rows.norm(dim=-1, keepdim=True) for rows in (predictions, projections.detach()))
    expected = -(unit[0] * other[1]).sum(1).mean() / 2 - (unit[1] * other[0]).sum(1).mean() / 2
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, predictions)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])
    assert torch.autograd.grad(found, projections, allow_unused=True) == (None,)


@pytest.mark.parametrize("scope", ["all", "head"])
def test_it_trains_under_exact_inner_steps(simsiam, scope):
    views = [torch.randn(8, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    method = toy()
    result = GeSSL(method, GesslConfig(inner_steps=1, inner_lr=0.1, scope=scope, w_sigma=1.0))(views)
    result.loss.backward()
    assert result.metrics["sigma"] > 0 and all(
        parameter.grad is not None for parameter in method.parameters()
    )


def test_its_recipe_names_the_source_of_every_number():
    recipe = yaml.safe_load(RECIPE)
    assert set(recipe["config"]) <= set(recipe["source"]) and recipe["config"]["method"]["name"] == "simsiam"


def test_one_file_and_one_recipe_are_all_that_a_new_method_takes(tmp_path):
    for folder in ("fastgessl", "kernels", "pipelines"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "fastgessl" / "methods" / "simsiam.py").write_text(CODE)
    (tmp_path / "fastgessl" / "recipes" / "methods" / "simsiam.yaml").write_text(RECIPE)
    options = "--train.max_steps 2 --train.batch_size 32 --model.width 0.125 --views.size 8 --evaluate.tasks knn --train.run_dir run"
    command = [sys.executable, "-m", "fastgessl", "train", "digits-simsiam-gessl", *options.split()]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "run" / "encoder.safetensors").is_file() and "GeSSL over simsiam" in outcome.stdout
