"""A study's choices see no test image, its cells are run once, and its differences are paired."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bench import does_gessl_help, results, studies


def test_choices_are_made_on_training_images_alone(tmp_path):
    arrays = studies.arrays_of("digits")
    whole, choice = (np.load(path) for path in studies.write_parts(tmp_path, arrays, 0.5))
    assert sorted(image.tobytes() for part in ("train_x", "test_x") for image in choice[part]) == sorted(
        image.tobytes() for image in whole["train_x"]
    )
    assert {image.tobytes() for image in whole["train_x"]} <= {image.tobytes() for image in arrays["train_x"]}
    assert len(whole["train_x"]) == round(len(arrays["train_x"]) / 2) and len(choice["test_x"]) == round(
        0.2 * len(whole["train_x"])
    )
    assert np.array_equal(whole["test_x"], arrays["test_x"]) and np.array_equal(
        whole["test_y"], arrays["test_y"]
    )


def test_paired_differences_have_students_interval():
    own, other = (0.6, 0.9, 1.0), (0.5, 0.7, 0.6)
    differences = [0.1, 0.2, 0.4]
    low, high = stats.t.interval(0.95, 2, loc=statistics.mean(differences), scale=stats.sem(differences))
    found = studies.paired(own, other)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.7 / 3, low, high))


def test_every_measure_of_an_evaluation_is_taken():
    found = {
        "knn": {"accuracy": 0.5, "k": 20},
        "sigma": {"discriminability": 0.1, "generalisation": 0.2},
        "label_fractions": [{"sigma": 0.3}],
    }
    assert studies.leaves(found) == {
        "knn.accuracy": 0.5,
        "sigma.discriminability": 0.1,
        "sigma.generalisation": 0.2,
        "label_fractions.0.sigma": 0.3,
    }


def test_each_encoder_s_universality_and_transfer_are_taken(tmp_path):
    arrays = {
        "x": np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8),
        "y": np.arange(60) % 3,
    }
    np.savez(
        tmp_path / "other.npz",
        train_x=arrays["x"],
        train_y=arrays["y"],
        test_x=arrays["x"],
        test_y=arrays["y"],
    )
    tiny = {"train.epochs": 1, "train.batch_size": 20, "model.width": 0.0625, "views.size": 8}
    np.savez(
        tmp_path / "own.npz", train_x=arrays["x"], train_y=arrays["y"], test_x=arrays["x"], test_y=arrays["y"]
    )
    cell = studies.Cell(tmp_path / "cell", "digits-simclr", tmp_path / "own.npz", 0, tiny)
    asked = ("--evaluate.tasks", "knn", "universality", "--evaluate.transfer", str(tmp_path / "other.npz"))
    found = studies.rows_of(studies.evaluation(cell, asked, time.monotonic() + 600))
    for row in ("raw pixels", "untrained encoder", "this run"):
        measures = studies.leaves(found[row])
        groups = {
            f"universality.{group}" for group in ("discriminability", "generalisation", "transferability")
        }
        assert measures.keys() == {"knn.accuracy", "transfer.other.knn.accuracy", *groups}


@pytest.fixture
def untrained(monkeypatch):
    """Cells whose training only leaves an evaluation."""
    trained = []

    def train(cell, common, deadline):
        trained.append(cell)
        cell.folder.mkdir()
        (cell.folder / "evaluation.json").write_text(
            json.dumps({"rows": {"this run": {"knn": {"accuracy": 0.75}}}})
        )

    monkeypatch.setattr(studies, "_train", train)
    return trained


def test_a_finished_cell_is_not_run_again(tmp_path, untrained):
    cell = studies.Cell(tmp_path / "cell", "digits-simclr", tmp_path / "absent.npz", 0, {})
    for _ in range(2):
        assert studies.measured(cell, (), 0.0) == {"knn.accuracy": 0.75}
    assert untrained == [cell]
    (commit,) = studies.commits(tmp_path)
    assert commit == results.commit()


def test_a_cell_of_other_options_or_data_is_not_taken_for_this_one(tmp_path, untrained):
    data = tmp_path / "data.npz"
    data.write_bytes(b"one")
    cell = studies.Cell(tmp_path / "cell", "digits-simclr", data, 0, {"train.epochs": 1})
    studies.measured(cell, (), 0.0)
    for other, judging in (
        (replace(cell, options={"train.epochs": 2}), ()),
        (replace(cell, seed=1), ()),
        (cell, ("--evaluate.tasks", "knn")),
    ):
        with pytest.raises(ValueError, match="was begun with"):
            studies.measured(other, judging, 0.0)
    data.write_bytes(b"two")
    with pytest.raises(ValueError, match="was begun with data"):
        studies.measured(cell, (), 0.0)
    (tmp_path / "cell.cell.json").unlink()
    with pytest.raises(ValueError, match=r"without cell\.cell\.json"):
        studies.measured(cell, (), 0.0)


def test_a_cell_that_fails_says_why(tmp_path):
    cell = studies.Cell(tmp_path / "cell", "digits-simclr", tmp_path / "absent.npz", 0, {})
    with pytest.raises(RuntimeError, match=r"absent\.npz"):
        studies.measured(cell, (), time.monotonic() + 600)


def test_a_longer_gessl_step_gives_plain_training_more_epochs_at_equal_seconds(tmp_path, monkeypatch):
    trained = {}

    def evaluation(cell, judging, deadline):
        trained[cell.folder.name] = dict(cell.options)
        accuracy = 0.5 + 0.1 * ("gessl" in cell.folder.name) + 0.01 * cell.seed
        return {
            "rows": {
                "this run": {"linear": {"accuracy": accuracy}},
                "raw pixels": {"linear": {"accuracy": 0.25}},
            }
        }

    monkeypatch.setattr(studies, "evaluation", evaluation)
    ratios = iter((1.5, 1.1, "measured again"))
    monkeypatch.setattr(studies, "step_time_ratio", lambda one, other: next(ratios))
    asker = does_gessl_help.Asker(does_gessl_help.STUDIES["digits"], tmp_path, (), time.monotonic() + 1)
    answer = asker.answer("simclr", 1.0, tmp_path / "all.npz", tmp_path / "choice.npz")
    epochs = {
        name: trained[f"{name}-seed0"]["train.epochs"]
        for name in ("plain", "plain-as-long-as-fast", "plain-as-long-as-head")
    }
    assert epochs == {"plain": 50, "plain-as-long-as-fast": 75, "plain-as-long-as-head": 55}
    assert answer["paired"]["GeSSL, fast"]["plain"]["linear.accuracy"]["mean"] == pytest.approx(0.1)
    assert answer["paired"]["GeSSL, head"].keys() == {"plain", "plain, as long as head"}
    # What decides the lengths is measured once, however often the study goes on.
    assert asker.answer("simclr", 1.0, tmp_path / "all.npz", tmp_path / "choice.npz") == answer
    assert answer["mean"]["raw pixels"]["linear.accuracy"] == {"mean": 0.25, "deviation": 0.0}
    assert "GeSSL, head" in str(does_gessl_help.table("digits", answer).columns[0]._cells)


@pytest.mark.slow
def test_a_study_is_cut_by_its_time_and_goes_on_from_there(tmp_path):
    words = ["--study", "tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    does_gessl_help.main([*words, "--minutes", "0.2"])
    (path,) = tmp_path.glob("*/*does-gessl-help-tiny.json")
    assert not json.loads(path.read_text())["complete"]
    does_gessl_help.main(words)
    assert json.loads(path.read_text())["complete"]
