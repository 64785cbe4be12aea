"""Numbers going bad: the step is given back, counted, and after so many in a row explained; a dead model is
pointed out.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reliability.small_training import differences, run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl.config import UsageError
from fastgessl.methods import METHODS
from fastgessl.methods.byol import BYOL
from fastgessl.methods.moco import MoCo
from fastgessl.methods.simclr import SimCLR
from fastgessl.runs import checkpoint
from fastgessl.training import health as guard


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
    training = start(config, run)
    first = checkpoint.find(run, "auto")
    monkeypatch.setattr(BadViews, "forwards", 2)
    run_steps(training, run, training.load(first), one=True)
    before, after = (checkpoint.load(run / "checkpoints" / f"step-00000000{step}") for step in (1, 2))
    assert differences(after["objective"], before["objective"]) == []
    assert differences(after["optimizer"]["state"], before["optimizer"]["state"]) == []
    assert after["loader"] != before["loader"]
    assert after["skipped"] == 1
    line = read_lines(run / "metrics.jsonl")[-1]
    assert (line["step"], line["skipped"], line["loss"], line["gradient_norm"]) == (2, 1, None, None)


def test_the_run_goes_on_after_a_bad_step_and_counts_it(data, tmp_path, monkeypatch):
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
    with pytest.raises(UsageError, match=r"3 steps in a row, 3 to 5, .*features.*rank 0") as stopped:
        run_steps(start(config, run), run)
    assert "\n" not in str(stopped.value)
    command = shlex.split(str(stopped.value).rsplit(": ", 1)[1])
    state_before = Path(command[command.index("--train.resume") + 1])
    assert (
        checkpoint.load(state_before)["loader"]
        == checkpoint.load(run / "checkpoints" / "step-000000002")["loader"]
    )
    again = start(config, tmp_path / "again")
    monkeypatch.setattr(BadViews, "forwards", 4)
    with pytest.raises(UsageError, match="3 steps in a row, 3 to 5"):
        run_steps(again, tmp_path / "again", again.load(state_before))


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
        training.save(tmp_path, 1)
    assert checkpoint.complete(tmp_path) == []


class Collapsed(SimCLR):
    def forward(self, views=None, *, features=None):
        out = super().forward(views, features=features)
        return replace(out, projections=1 + 1e-4 * out.projections)


class Stuck(MoCo):
    def update_state(self, passes, step):
        pass


@pytest.mark.parametrize(
    ("name", "broken", "flag"), [("simclr", Collapsed, "collapsed"), ("moco", Stuck, "stuck_queue")]
)
def test_a_collapse_and_a_stuck_queue_are_flagged_and_healthy_training_is_not(
    data, tmp_path, monkeypatch, capsys, name, broken, flag
):
    monkeypatch.setitem(guard._PATIENCE, "collapsed", 3)
    run_steps(
        start(small_config(data, name, train={"max_steps": 6}), tmp_path / "healthy"), tmp_path / "healthy"
    )
    assert not any(
        {"collapsed", "stuck_queue"} & line.keys()
        for line in read_lines(tmp_path / "healthy" / "metrics.jsonl")
    )
    assert "fastgessl train: step" not in capsys.readouterr().err
    monkeypatch.setitem(METHODS, name, broken)
    run_steps(
        start(small_config(data, name, train={"max_steps": 6}), tmp_path / "broken"), tmp_path / "broken"
    )
    flagged = [line["step"] for line in read_lines(tmp_path / "broken" / "metrics.jsonl") if line.get(flag)]
    assert flagged == ([3, 4, 5, 6] if flag == "collapsed" else [4, 5, 6])
    assert capsys.readouterr().err.count("fastgessl train: step") == 1
