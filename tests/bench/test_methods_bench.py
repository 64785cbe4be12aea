"""The tables of methods are made of real runs, go on where they were cut, and say what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import methods, studies
from fastgessl.methods import METHODS
from fastgessl.recipes import load


def test_every_registered_method_has_a_row():
    assert set(methods.all_methods(sorted(METHODS))) == set(METHODS)


def test_outliers_are_the_share_that_is_asked_for_and_show_no_character():
    arrays = studies.arrays_of("digits")
    for share in (0.0, 0.05, 0.2):
        mixed = methods.with_outliers(arrays, share)
        added = mixed["train_x"][len(arrays["train_x"]) :]
        assert len(added) / len(mixed["train_x"]) == pytest.approx(share, abs=1e-3)
        assert np.array_equal(mixed["train_x"][: len(arrays["train_x"])], arrays["train_x"])
        assert np.array_equal(mixed["test_x"], arrays["test_x"]) and len(mixed["train_y"]) == len(
            mixed["train_x"]
        )
    histograms = {
        image.tobytes() for image in np.sort(arrays["train_x"].reshape(len(arrays["train_x"]), -1), axis=1)
    }
    assert all(image.tobytes() in histograms for image in np.sort(added.reshape(len(added), -1), axis=1))
    assert not {image.tobytes() for image in added} & {image.tobytes() for image in arrays["train_x"]}


def test_the_tables_are_made_of_recipes_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "step_time_ratio", lambda one, other: 0.5)
    rows = methods.dsa_rows() | methods.ladder_rows(tmp_path)
    for row in rows.values():
        studies.with_options(row.recipe, row.options)
    assert (
        load(rows["byol, DSA, 20% outliers"].recipe).config.dsa.weight > 0
        and rows["byol, DSA, 20% outliers"].outliers == 0.2
    )


def test_equal_compute_gives_the_cheaper_method_more_epochs_and_the_same_whenever_it_goes_on(
    tmp_path, monkeypatch
):
    ratios = {"dissl": iter((0.5, 0.7)), "swav": iter((2.0, 1.5))}
    monkeypatch.setattr(studies, "step_time_ratio", lambda one, other: next(ratios[one.method.name]))
    rows = methods.ladder_rows(tmp_path, {"train.epochs": 10})
    assert rows["swav, multi-crop"].options["train.epochs"] == 10
    assert rows["dissl, multi-crop, equal compute"].options["train.epochs"] == 20
    assert methods.ladder_rows(tmp_path, {"train.epochs": 10}) == rows


def test_the_share_of_the_gap_is_that_between_plain_and_supervised():
    seeds = [
        {"supervised": {"linear": 1.0}, "byol, plain": {"linear": 0.6}, "byol, DSA": {"linear": 0.7}},
        {"supervised": {"linear": 0.8}, "byol, plain": {"linear": 0.4}, "byol, DSA": {"linear": 0.5}},
    ]
    answer = methods.means(seeds)
    assert methods.gap_closed(answer) == {"byol, DSA": {"linear": pytest.approx(0.25)}}
    assert "+25%" in str(methods.printed("t", answer, methods.gap_closed(answer)).columns[-1]._cells)


def test_a_table_that_is_cut_has_what_was_done(tmp_path, monkeypatch):
    def evaluation(cell, judging, deadline):
        if len(ran) == 3:
            raise studies.OutOfTime
        ran.append((cell.folder.name, cell.seed, cell.data.name))
        return {"rows": {"raw pixels": {"knn": {"accuracy": 0.2}}, "this run": {"knn": {"accuracy": 0.5}}}}

    ran: list[tuple[str, int, str]] = []
    monkeypatch.setattr(studies, "evaluation", evaluation)
    runner = methods.Runner(tmp_path, ("knn",), deadline=0)
    seeds, complete = runner.table(methods.all_methods(["barlow", "byol"]), 2)
    assert ran == [
        ("barlow-seed0", 0, "digits-0.npz"),
        ("byol-seed0", 0, "digits-0.npz"),
        ("barlow-seed1", 1, "digits-0.npz"),
    ]
    assert not complete and [list(seed) for seed in seeds] == [
        ["raw pixels", "barlow", "byol"],
        ["raw pixels", "barlow"],
    ]
    assert methods.means(seeds)["barlow"]["knn"] == {"mean": 0.5, "deviation": 0.0}


@pytest.mark.slow
def test_a_table_of_real_runs_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "SHARES", (0.2,))
    rows = methods.dsa_rows()
    tiny = {"train.epochs": 1, "model.width": 0.0625, "views.size": 8}
    rows = {
        name: methods.replace(rows[name], options=tiny)
        for name in ("simclr, plain, 20% outliers", "simclr, DSA, 20% outliers")
    }
    runner = methods.Runner(tmp_path, ("linear", "geometry"), deadline=1e12)
    first = dict(list(rows.items())[:1])
    seeds, complete = runner.table(first, 1)
    assert complete and set(seeds[0]) == {"raw pixels", "untrained encoder", *first}
    clean = json.loads((tmp_path / "simclr-plain-20-outliers-seed0" / "clean.json").read_text())
    assert (
        seeds[0]["simclr, plain, 20% outliers"]["crowding"]
        == clean["rows"]["this run"]["geometry"]["crowding"]
    )
    cut = methods.Runner(tmp_path, ("linear", "geometry"), deadline=0)
    assert cut.table(rows, 1) == (seeds, False)
