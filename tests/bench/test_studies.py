"""A study's choices see no test image, its cells are run once, and its tables say what was measured."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from bench import results, studies
from bench.studies import Cell, does_gessl_help, methods
from fastgessl.recipes import load

FOREVER = time.monotonic() + 1e6


def test_choices_are_made_on_training_images_alone():
    arrays = studies.arrays_of("digits")
    whole, choice = studies.parts_of(arrays, 0.5)
    chosen = [image.tobytes() for part in ("train_x", "test_x") for image in choice[part]]
    assert sorted(chosen) == sorted(image.tobytes() for image in whole["train_x"])
    assert {image.tobytes() for image in whole["train_x"]} <= {image.tobytes() for image in arrays["train_x"]}
    assert len(whole["train_x"]) == round(len(arrays["train_x"]) / 2)
    assert len(choice["test_x"]) == round(0.2 * len(whole["train_x"]))
    assert np.array_equal(whole["test_x"], arrays["test_x"])


def test_each_encoder_s_universality_and_transfer_are_taken(tmp_path):
    x = np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8)
    y = np.arange(60) % 3
    for name in ("own", "other"):
        np.savez(tmp_path / f"{name}.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    tiny = {"train.epochs": 1, "train.batch_size": 20, "model.width": 0.125, "views.size": 8}
    cell = Cell(tmp_path / "cell", "digits-simclr", tmp_path / "own.npz", 0, tiny)
    asked = ("--evaluate.tasks", "knn", "universality", "--evaluate.transfer", str(tmp_path / "other.npz"))
    found = studies.rows_of(cell.evaluation(asked, FOREVER))
    groups = {f"universality.{group}" for group in ("discriminability", "generalisation", "transferability")}
    for row in ("raw pixels", "untrained encoder", "this run"):
        assert studies.leaves(found[row]).keys() == {"knn.accuracy", "transfer.other.knn.accuracy", *groups}


@pytest.fixture
def trained(monkeypatch):
    """Cells whose training only leaves an evaluation."""
    trained = []

    def train(cell, judging, deadline):
        trained.append(cell)
        cell.folder.mkdir()
        evaluation = {"rows": {"this run": {"knn": {"accuracy": 0.75}}}}
        (cell.folder / "evaluation.json").write_text(json.dumps(evaluation))

    monkeypatch.setattr(Cell, "_train", train)
    return trained


def test_a_finished_cell_is_not_run_again_and_no_other_is_taken_for_it(tmp_path, trained):
    data = tmp_path / "data.npz"
    data.write_bytes(b"one")
    cell = Cell(tmp_path / "cell", "digits-simclr", data, 0, {"train.epochs": 1})
    for _ in range(2):
        assert cell.evaluation((), 0.0)["rows"]["this run"]["knn"] == {"accuracy": 0.75}
    assert trained == [cell]
    record = tmp_path / "cell.cell.json"
    assert json.loads(record.read_text())["commit"] == results.commit()
    tasks = ("--evaluate.tasks", "knn")
    others = (replace(cell, options={"train.epochs": 2}), ()), (replace(cell, seed=1), ()), (cell, tasks)
    for other, judging in others:
        with pytest.raises(ValueError, match="was begun with"):
            other.evaluation(judging, 0.0)
    data.write_bytes(b"two")
    with pytest.raises(ValueError, match="was begun with data"):
        cell.evaluation((), 0.0)
    record.unlink()
    with pytest.raises(ValueError, match=r"without cell\.cell\.json"):
        cell.evaluation((), 0.0)


def test_a_cell_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"absent\.npz"):
        Cell(tmp_path / "cell", "digits-simclr", tmp_path / "absent.npz", 0, {}).evaluation((), FOREVER)


def test_a_longer_gessl_step_gives_plain_training_more_epochs_at_equal_seconds(tmp_path, monkeypatch):
    trained = {}

    def evaluation(cell, judging, deadline):
        trained[cell.folder.name] = dict(cell.options)
        accuracy = 0.5 + 0.1 * ("gessl" in cell.folder.name) + 0.01 * cell.seed
        rows = {"this run": {"linear": {"accuracy": accuracy}}, "raw pixels": {"linear": {"accuracy": 0.25}}}
        return {"rows": rows}

    monkeypatch.setattr(Cell, "evaluation", evaluation)
    ratios = iter((1.5, 1.1, "measured again"))
    monkeypatch.setattr(studies, "step_time_ratio", lambda one, other: next(ratios))
    study = does_gessl_help.STUDIES["digits"]
    asker = does_gessl_help.Asker(study, tmp_path, (), 0.0)
    arrays = studies.arrays_of("digits")
    answer = asker.answer("simclr", 1.0, arrays)
    lengths = [("plain", 50), ("plain-as-long-as-fast", 75), ("plain-as-long-as-head", 55)]
    assert [trained[f"{name}-seed0"]["train.epochs"] for name, _ in lengths] == [
        count for _, count in lengths
    ]
    assert answer["paired"]["GeSSL, fast"]["plain"]["linear.accuracy"]["mean"] == pytest.approx(0.1)
    assert answer["paired"]["GeSSL, head"].keys() == {"plain", "plain, as long as head"}
    assert answer["mean"]["raw pixels"]["linear.accuracy"] == {"mean": 0.25, "deviation": 0.0}
    # What decides the lengths is measured once, however often the study continues.
    assert asker.answer("simclr", 1.0, arrays) == answer


def test_outliers_are_the_share_that_is_asked_for_and_show_no_character():
    arrays = studies.arrays_of("digits")
    count = len(arrays["train_x"])
    for share in (0.0, 0.05, 0.2):
        mixed = methods.with_outliers(arrays, share)
        added = mixed["train_x"][count:]
        assert len(added) / len(mixed["train_x"]) == pytest.approx(share, abs=1e-3)
        assert np.array_equal(mixed["train_x"][:count], arrays["train_x"])
        assert np.array_equal(mixed["test_x"], arrays["test_x"])
        assert len(mixed["train_y"]) == len(mixed["train_x"])
    sorted_pixels = {image.tobytes() for image in np.sort(arrays["train_x"].reshape(count, -1), axis=1)}
    assert all(image.tobytes() in sorted_pixels for image in np.sort(added.reshape(len(added), -1), axis=1))
    assert not {image.tobytes() for image in added} & {image.tobytes() for image in arrays["train_x"]}


def test_tables_are_made_of_recipes_that_exist_and_equal_compute_is_kept(tmp_path, monkeypatch):
    ratios = iter((0.5, "measured again"))
    monkeypatch.setattr(studies, "step_time_ratio", lambda one, other: next(ratios))
    ladder = methods.ladder_rows(tmp_path, {"train.epochs": 10})
    assert ladder["swav, multi-crop"].options["train.epochs"] == 10
    assert ladder["dissl, multi-crop, equal compute"].options["train.epochs"] == 20
    assert methods.ladder_rows(tmp_path, {"train.epochs": 10}) == ladder
    rows = methods.dsa_rows() | ladder
    for row in rows.values():
        studies.with_options(row.recipe, row.options)
    regulated = rows["byol, DSA, 20% outliers"]
    assert load(regulated.recipe).config.dsa.weight > 0 and regulated.outliers == 0.2


def test_the_share_of_the_gap_is_that_between_plain_and_supervised():
    seeds = [
        {"supervised": {"linear": 1.0}, "byol, plain": {"linear": 0.6}, "byol, DSA": {"linear": 0.7}},
        {"supervised": {"linear": 0.8}, "byol, plain": {"linear": 0.4}, "byol, DSA": {"linear": 0.5}},
    ]
    assert methods.gap_closed(studies.means(seeds)) == {"byol, DSA": {"linear": pytest.approx(0.25)}}


def test_a_table_that_is_cut_has_what_was_done(tmp_path, monkeypatch, capsys):
    def evaluation(cell, judging, deadline):
        if len(ran) == 3:
            raise studies.OutOfTime
        ran.append((cell.folder.name, cell.seed, cell.data.name))
        return {"rows": {"raw pixels": {"knn": {"accuracy": 0.2}}, "this run": {"knn": {"accuracy": 0.5}}}}

    ran = []
    monkeypatch.setattr(Cell, "evaluation", evaluation)
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    methods.main(["--methods", "barlow", "byol", "--seeds", "2", *where])
    names = ["barlow-seed0", "byol-seed0", "barlow-seed1"]
    assert ran == [(name, int(name[-1]), "digits-0.npz") for name in names]
    (path,) = tmp_path.glob("*/*-methods-digits.json")
    record = json.loads(path.read_text())
    assert not record["complete"] and "Call it again to continue" in capsys.readouterr().out
    assert [list(seed) for seed in record["seeds"]] == [
        ["raw pixels", "barlow", "byol"],
        ["raw pixels", "barlow"],
    ]
    assert record["mean"]["barlow"]["knn"] == {"mean": 0.5, "deviation": 0.0}


@pytest.mark.slow
def test_a_study_is_cut_by_its_time_and_continues_from_there(tmp_path):
    words = ["--study", "tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    does_gessl_help.main([*words, "--minutes", "0.2"])
    (path,) = tmp_path.glob("*/*does-gessl-help-tiny.json")
    assert not json.loads(path.read_text())["complete"]
    does_gessl_help.main(words)
    assert json.loads(path.read_text())["complete"]


@pytest.mark.slow
def test_a_table_of_real_runs_is_judged_on_clean_images(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "SHARES", (0.2,))
    tiny = {"train.epochs": 1, "model.width": 0.125, "views.size": 8}
    name = "simclr, plain, 20% outliers"
    rows = {name: replace(methods.dsa_rows()[name], options=tiny)}
    runner = methods.Runner(tmp_path, ("linear", "geometry"), deadline=FOREVER)
    seeds, complete = runner.table(rows, 1)
    assert complete and seeds[0].keys() == {"raw pixels", "untrained encoder", name}
    clean = json.loads((tmp_path / "simclr-plain-20-outliers-seed0" / "clean.json").read_text())
    assert seeds[0][name]["crowding"] == clean["rows"]["this run"]["geometry"]["crowding"]
