"""Directions in use, against eigenvalues; and a run whose projections shrink onto a line says so in its log."""

import pytest
import torch
from tiny_run import TINY, read_lines
from torch import nn

from fastgessl.training import health as guard
from fastgessl.training.collapse import directions_of


@pytest.mark.parametrize(("images", "width"), [(20, 5), (5, 20)])
def test_directions_are_the_participation_ratio_of_the_covariance_s_eigenvalues(images, width):
    torch.manual_seed(0)
    rows = torch.randn(2, images, width)
    expected = []
    for view in rows:
        unit = (view / view.norm(dim=1, keepdim=True)).double()
        eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T))
        expected.append(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
    assert directions_of(rows).item() == pytest.approx((sum(expected) / 2).item(), rel=1e-4)


def test_one_point_has_no_direction_and_an_arc_hardly_more_than_one():
    assert directions_of(torch.ones(2, 8, 4)) == 0
    angles = torch.linspace(0, 0.1, 9)
    assert directions_of(torch.stack([angles.cos(), angles.sin()], 1)[None]).item() == pytest.approx(
        1.0, abs=1e-2
    )


class OneDirection(nn.Module):
    """A projector whose outputs differ along one direction only."""

    def __init__(self, inputs, hidden, outputs, **_):
        super().__init__()
        self.layer = nn.Linear(inputs, 1, bias=False)
        self.register_buffer("along", torch.eye(outputs)[0])
        self.register_buffer("start", torch.eye(outputs)[1])

    def forward(self, rows):
        return self.start + 0.1 * self.layer(rows).tanh() * self.along


def test_projections_on_a_line_are_flagged_in_the_log_and_healthy_ones_are_not(
    tmp_path, monkeypatch, fastgessl
):
    monkeypatch.setitem(guard._PATIENCE, "one_direction", 2)
    run = ["train", "digits-simclr", *TINY, "--train.run_dir"]
    assert fastgessl(*run, tmp_path / "healthy").code == 0
    healthy = read_lines(tmp_path / "healthy" / "metrics.jsonl")
    assert all(line["directions"] > 1.05 and "one_direction" not in line for line in healthy)
    monkeypatch.setattr("fastgessl.methods.simclr.Projector", OneDirection)
    outcome = fastgessl(*run, tmp_path / "line")
    flagged = [
        line["step"] for line in read_lines(tmp_path / "line" / "metrics.jsonl") if line.get("one_direction")
    ]
    assert flagged == [2, 3, 4] and outcome.err.count("the projections lie on a line") == 1


def test_even_assignments_are_flagged_and_those_that_tell_images_apart_are_not(
    tmp_path, monkeypatch, fastgessl
):
    """A temperature at which every image is assigned evenly, which is where a run of DISSL can stay for good."""
    monkeypatch.setitem(guard._PATIENCE, "uninformed", 3)
    run = ["train", "digits-dissl", *TINY, "--train.run_dir"]
    assert fastgessl(*run, tmp_path / "healthy").code == 0
    (first, *_) = read_lines(tmp_path / "healthy" / "metrics.jsonl")
    assert (
        first["information"] == pytest.approx(first["maximality"] - first["determinism"], abs=1e-5)
        and first["information"] > 0.05
    )
    outcome = fastgessl(*run, tmp_path / "even", "--method.dissl.assignment_temperature", 1000)
    flagged = [
        line["step"] for line in read_lines(tmp_path / "even" / "metrics.jsonl") if line.get("uninformed")
    ]
    assert flagged == [3, 4] and outcome.err.count("the assignments hardly depend on the image") == 1
