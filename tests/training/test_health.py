"""Numbers going bad: a step that is not finite is skipped, counted, and after so many in a row explained; a
collapse is pointed out.
"""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import differences, run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl.config import UsageError
from fastgessl.methods import METHODS
from fastgessl.methods.byol import BYOL
from fastgessl.methods.simclr import SimCLR
from fastgessl.runs import checkpoint
from fastgessl.training import health


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


class BadViews(BYOL):
    """Sees views of NaN in the forwards that `bad` names, so that batch norm, momentum encoder and weights
    are all in danger.
    """

    bad: frozenset[int] = frozenset()
    forwards = 0

    def forward(self, views=None, *, features=None):
        BadViews.forwards += 1
        poison = torch.nan if BadViews.forwards - 1 in self.bad else 0.0
        return super().forward([view + poison for view in views], features=features)


def bad_forwards(monkeypatch, *numbers):
    monkeypatch.setitem(METHODS, "byol", BadViews)
    monkeypatch.setattr(BadViews, "bad", frozenset(numbers))
    monkeypatch.setattr(BadViews, "forwards", 0)


def test_a_step_that_is_not_finite_leaves_weights_statistics_and_momentum_as_they_were(
    data, tmp_path, monkeypatch
):
    config = small_config(data, "byol", train={"max_steps": 3})
    bad_forwards(monkeypatch, 3)  # two forwards a step: the second of the second step
    run = tmp_path / "run"
    run_steps(start(config, run), run, one=True)
    training = start(config, run, checkpoint.find(run, "auto"))
    monkeypatch.setattr(BadViews, "forwards", 2)
    run_steps(training, run, one=True)
    before, after = (checkpoint.load(run / "checkpoints" / f"step-00000000{step}") for step in (1, 2))
    assert differences(after["objective"], before["objective"]) == []
    assert differences(after["optimizer"]["state"], before["optimizer"]["state"]) == []
    assert after["loader"] != before["loader"]
    assert after["skipped"] == 1
    line = read_lines(run / "metrics.jsonl")[-1]
    assert (line["step"], line["skipped"], line["loss"], line["gradient_norm"]) == (2, 1, None, None)


def test_the_run_continues_after_a_bad_step_and_counts_it(data, tmp_path, monkeypatch):
    bad_forwards(monkeypatch, 3, 7)
    training = start(small_config(data, "byol", train={"max_steps": 6}), tmp_path)
    assert run_steps(training, tmp_path) == 6
    assert [line.get("skipped") for line in read_lines(tmp_path / "metrics.jsonl")] == [
        None,
        1,
        None,
        2,
        None,
        None,
    ]
    assert all(weight.isfinite().all() for weight in training.method.state_dict().values())
    saved = [int(folder.name.removeprefix("step-")) for folder in checkpoint.complete(tmp_path)]
    assert saved == [1, 3, 5, 6]


def test_so_many_in_a_row_stop_the_run_with_a_state_that_repeats_them(data, tmp_path, monkeypatch):
    bad_forwards(monkeypatch, *range(4, 100))
    config = small_config(data, "byol", train={"max_steps": 50, "nonfinite_limit": 3})
    run = tmp_path / "a run"
    with pytest.raises(
        UsageError, match=r"3 steps in a row, 3 to 5, .*features.*rank 0.*--optim.base_lr"
    ) as stopped:
        run_steps(start(config, run), run)
    assert "\n" not in str(stopped.value)
    command = shlex.split(str(stopped.value).rsplit(": ", 1)[1])
    state_before = Path(command[command.index("--train.resume") + 1])
    assert (
        checkpoint.load(state_before)["loader"]
        == checkpoint.load(run / "checkpoints" / "step-000000002")["loader"]
    )
    again = start(config, tmp_path / "again", state_before)
    monkeypatch.setattr(BadViews, "forwards", 4)
    with pytest.raises(UsageError, match="3 steps in a row, 3 to 5"):
        run_steps(again, tmp_path / "again")


class Bad(SimCLR):
    """Breaks in one place."""

    where = ""

    def loss(self, out, aux=None):
        loss = super().loss(out, aux)
        if self.where == "loss":
            return loss * torch.inf
        if self.where == "gradient":  # of a square root at 0: the value is finite, the slope is not
            return loss + (0 * out.projections).square().sum().sqrt()
        return loss

    def forward(self, views=None, *, features=None):
        out = super().forward(views, features=features)
        return replace(out, projections=out.projections / 0) if self.where == "projections" else out


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("loss", "the metric loss_ssl was the first"),
        ("gradient", "the gradient of backbone."),
        ("projections", "the method's projections was the first"),
        ("weight", "the weight projector.0.weight was the first"),
    ],
)
def test_the_first_tensor_that_went_bad_is_named(data, tmp_path, monkeypatch, where, named):
    monkeypatch.setitem(METHODS, "simclr", Bad)
    monkeypatch.setattr(Bad, "where", where)
    training = start(small_config(data, train={"nonfinite_limit": 1}), tmp_path)
    if where == "weight":
        with torch.no_grad():
            training.method.projector[0].weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match=named):
        run_steps(training, tmp_path)


def test_weights_that_are_not_finite_are_never_saved(data, tmp_path):
    training = start(small_config(data, train={"max_steps": 1}), tmp_path)
    with torch.no_grad():
        training.method.projector[0].weight[0, 0] = torch.inf
    with pytest.raises(UsageError, match="weights that are not finite"):
        training.save(tmp_path)
    assert checkpoint.complete(tmp_path) == []


class Collapsed(SimCLR):
    def forward(self, views=None, *, features=None):
        out = super().forward(views, features=features)
        return replace(out, projections=1 + 1e-4 * out.projections)


def test_a_collapse_is_said_once_and_healthy_training_is_not(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(health, "PATIENCE", 3)
    config = small_config(data, train={"max_steps": 6})
    run_steps(start(config, tmp_path / "healthy"), tmp_path / "healthy")
    assert "fastgessl train: step" not in capsys.readouterr().err
    monkeypatch.setitem(METHODS, "simclr", Collapsed)
    run_steps(start(config, tmp_path / "broken"), tmp_path / "broken")
    assert capsys.readouterr().err.count("fastgessl train: step 3: the projections have collapsed") == 1
    for run, collapsed in (("healthy", False), ("broken", True)):
        lines = read_lines(tmp_path / run / "metrics.jsonl")
        assert [line["spread"] < 0.02 for line in lines] == [collapsed] * 6
        assert all(line["directions"] > 1 for line in lines)


@pytest.mark.parametrize(("images", "width"), [(20, 5), (5, 20)])
def test_spread_and_directions_follow_their_definitions(images, width):
    torch.manual_seed(0)
    projections = torch.randn(2, images, width)
    spreads, directions = [], []
    for view in projections.double():
        unit = view / view.norm(dim=1, keepdim=True)
        covariance = torch.cov(unit.T, correction=0)
        eigenvalues = torch.linalg.eigvalsh(covariance)
        spreads.append((covariance.diagonal().sqrt().mean() * width**0.5).item())
        directions.append((eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item())
    expected = [sum(spreads) / 2, sum(directions) / 2]
    assert health.shape_of(projections).tolist() == pytest.approx(expected, rel=1e-4)
    assert health.shape_of(torch.ones(2, 8, 4)).tolist() == [0, 0]
