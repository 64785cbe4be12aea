"""The real command from end to end: what a run writes, repeats, resumes and refuses."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import TINY, read_lines

from fastgessl import build
from fastgessl.methods.dissl import DISSL
from fastgessl.models import build_backbone
from fastgessl.recipes import load
from fastgessl.runs import checkpoint, read_config

GESSL = ("digits-simclr-gessl", *TINY)


def _photos(folder: Path, count: int, *, classes: int = 0) -> Path:
    random = np.random.default_rng(0)
    for place in range(count):
        parent = folder / f"class{place % classes}" if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20 + place % 5, 24, 3), dtype=np.uint8)).save(
            parent / f"{place}.jpg"
        )
    return folder


def test_a_run_writes_everything_and_evaluates(fastgessl, tmp_path):
    run = tmp_path / "run"
    outcome = fastgessl("train", *GESSL, "--train.run_dir", run)
    assert outcome.code == 0
    for file in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "timing.jsonl",
        "encoder.safetensors",
        "evaluation.json",
        "summary.json",
    ):
        assert (run / file).is_file(), file
    assert list((run / "tensorboard" / "fastgessl").glob("events*"))
    (recorded,) = (run / "tensorboard").rglob("hparams.yml")
    options = yaml.safe_load(recorded.read_text())
    assert (options["recipe"], options["optim.base_lr"], options["views.size"]) == (
        "digits-simclr-gessl",
        0.01,
        8,
    )
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert [("sigma" in line, "delta_loss" in line) for line in lines] == [(True, True), (False, False)] * 2
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert list(rows) == ["raw pixels", "untrained encoder", "this run"]
    assert all(0 <= row["knn"]["accuracy"] <= 1 for row in rows.values())
    assert "this run" in outcome.out
    assert str(run) in outcome.out


def test_the_written_configuration_gives_the_same_bytes_and_another_seed_does_not(fastgessl, tmp_path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for run, start, seed in ((first, GESSL, 3), (second, (first / "config.yaml",), 3), (other, GESSL, 4)):
        assert fastgessl("train", *start, "--train.run_dir", run, "--train.seed", seed).code == 0
    for file in ("metrics.jsonl", "encoder.safetensors", "evaluation.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
        assert (first / file).read_bytes() != (other / file).read_bytes(), file


@pytest.mark.parametrize("recipe", ["digits-simclr-gessl", "digits-byol-gessl-head"])
@pytest.mark.parametrize("stopped_at", [3, 20])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(fastgessl, tmp_path, recipe, stopped_at):
    # 18 steps are an epoch: one stop is within the first, one within the second.
    options = (
        recipe,
        *TINY,
        "--train.max_steps",
        21,
        "--train.keep_checkpoints",
        30,
        "--train.checkpoint_every",
        1,
        "--evaluate.every_epochs",
        1,
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert fastgessl("train", *options, "--train.run_dir", whole).code == 0
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("encoder*", "evaluation*", "summary*"))
    for folder in (resumed / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > stopped_at:
            shutil.rmtree(folder)
    outcome = fastgessl("train", *options, "--train.run_dir", resumed, "--train.resume", "auto")
    assert f"continued from step-{stopped_at:09d}" in outcome.out
    for file in ("metrics.jsonl", "encoder.safetensors", "evaluation.json"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file


def test_a_run_that_started_from_weights_continues_when_they_are_gone(fastgessl, tmp_path):
    source, run = tmp_path / "source.safetensors", tmp_path / "run"
    save_file(
        build_backbone(load("digits-simclr").config.model.model_copy(update={"width": 0.125})).state_dict(),
        source,
    )
    options = (
        "digits-simclr-dsa",
        *TINY,
        "--model.weights",
        source,
        "--dsa.helper",
        "test_resnet",
        "--dsa.neighbours",
        4,
    )
    helper = tmp_path / "helper.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), helper)
    options = (*options, "--dsa.helper_weights", helper, "--train.run_dir", run, "--train.max_steps")
    assert fastgessl("train", *options, 2).code == 0
    helped = load_file(helper)
    source.unlink(), helper.unlink()

    outcome = fastgessl("train", *options, 3, "--train.resume", "auto")
    assert outcome.code == 0, outcome.err
    kept = checkpoint.load(run / "checkpoints" / "step-000000003")["objective"]
    assert all(torch.equal(kept[f"method.helper.{name}"], value) for name, value in helped.items())
    assert fastgessl("evaluate", run, "--tasks", "knn").code == 0
    refused = fastgessl("train", *options, 3, "--train.run_dir", tmp_path / "new")
    assert refused.code == 2 and "there is no such file" in refused.err


@pytest.mark.parametrize("cached", [0, 32])
def test_a_method_is_measured_on_the_steps_that_are_logged_and_trains_the_same(
    fastgessl, tmp_path, monkeypatch, cached
):
    measured, measures = [], DISSL.measures
    monkeypatch.setattr(
        DISSL, "measures", lambda self, out, aux=None: measured.append(0) or measures(self, out, aux)
    )
    options = ("digits-dissl", *TINY, "--train.gradient_cache", cached, "--train.run_dir")
    assert fastgessl("train", *options, tmp_path / "every").code == 0
    assert len(measured) == 4
    assert fastgessl("train", *options, tmp_path / "second", "--log.every", 2).code == 0
    assert len(measured) == 4 + 2

    every, second = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("every", "second"))
    assert second == every[1::2] and "maximality" in second[0]


def test_an_older_checkpoint_continues_in_a_folder_of_its_own_and_never_in_the_run_s(fastgessl, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    options = (*GESSL, "--train.checkpoint_every", 1, "--train.keep_checkpoints", 2)
    assert fastgessl("train", *options, "--train.run_dir", run).code == 0
    older = ("--train.resume", run / "checkpoints" / "step-000000003")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "never written backwards" in fastgessl("train", *options, "--train.run_dir", run, *older).err

    same = fastgessl("train", *options, "--train.run_dir", tmp_path / "same", *older)
    assert same.code == 0, same.err
    assert "changed:" not in same.out
    for file in ("encoder.safetensors", "evaluation.json"):
        assert (tmp_path / "same" / file).read_bytes() == (run / file).read_bytes(), file
    changed = fastgessl("train", *options, "--train.run_dir", other, *older, "--optim.base_lr", 0.5)
    assert "changed: optim.base_lr: 0.01 -> 0.5\n" in changed.out
    assert [line["step"] for line in read_lines(other / "metrics.jsonl")] == [4]
    assert (other / "encoder.safetensors").read_bytes() != (run / "encoder.safetensors").read_bytes()
    assert (read_config(other).optim.base_lr, read_config(run).optim.base_lr) == (0.5, 0.01)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_option_that_is_changed_holds_for_the_next_continuation_too(fastgessl, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    options = (*GESSL, "--train.resume", "if_any", "--train.max_steps")
    assert fastgessl("train", *options, 2, "--train.run_dir", run).code == 0
    changed = fastgessl("train", *options, 3, "--train.run_dir", run, "--optim.base_lr", 0.5)
    assert "changed: optim.base_lr: 0.01 -> 0.5\n" in changed.out
    noted = json.loads((run / "environment-step-000000002.json").read_text())["changed"]
    assert noted == ["optim.base_lr: 0.01 -> 0.5", "train.max_steps: 2 -> 3"]
    shutil.copytree(run, again)
    for folder, start in ((run, run / "config.yaml"), (again, GESSL[0])):
        words = (*TINY, "--optim.base_lr", 0.5) if folder == again else ()
        further = ("--train.max_steps", 4, "--train.resume", "auto", "--train.run_dir", folder)
        assert fastgessl("train", start, *words, *further).code == 0
    assert (run / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_continued_run_keeps_the_batch_that_was_chosen_for_it(fastgessl, tmp_path, monkeypatch):
    options = (
        *GESSL,
        "--train.batch_size",
        0,
        "--train.run_dir",
        tmp_path / "run",
        "--train.resume",
        "if_any",
        "--train.max_steps",
    )
    first = fastgessl("train", *options, 2)
    assert "chosen: train.batch_size 64" in first.out
    # As on other processes, or beside other images: another batch would be chosen now.
    monkeypatch.setattr(build, "_BATCHES", (16, 32))
    second = fastgessl("train", *options, 4)
    assert second.code == 0, second.err
    assert "4 steps of 64 images" in second.out and "chosen:" not in second.out
    assert read_config(tmp_path / "run").train.batch_size == 64


def test_evaluation_during_training_changes_no_bit_of_the_encoder(fastgessl, tmp_path):
    options = (*GESSL, "--train.max_steps", 36)
    assert fastgessl("train", *options, "--train.run_dir", tmp_path / "without").code == 0
    options += ("--evaluate.every_epochs", 1)
    assert fastgessl("train", *options, "--train.run_dir", tmp_path / "with").code == 0
    without, watched = (load_file(tmp_path / name / "encoder.safetensors") for name in ("without", "with"))
    torch.testing.assert_close(watched, without, rtol=0, atol=0)
    notes = [line for line in read_lines(tmp_path / "with" / "metrics.jsonl") if "knn" in line]
    assert [line["step"] for line in notes] == [18, 36]
    assert 0 <= notes[0]["online_probe"] <= 1


def test_bf16_measures_a_sigma_above_zero(fastgessl, tmp_path):
    assert (
        fastgessl("train", *GESSL, "--train.precision", "bf16", "--train.run_dir", tmp_path / "run").code == 0
    )
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[0]["sigma"] > 0


def test_fresh_views_measure_sigma_elsewhere(fastgessl, tmp_path):
    for query in ("same", "fresh_views"):
        options = ("--gessl.query", query, "--gessl.w_ssl", 0.5, "--train.run_dir", tmp_path / query)
        assert fastgessl("train", *GESSL, *options).code == 0
    same, fresh = (read_lines(tmp_path / query / "metrics.jsonl")[0] for query in ("same", "fresh_views"))
    assert same["loss_ssl"] == fresh["loss_ssl"]
    assert same["sigma"] != fresh["sigma"]


@pytest.mark.parametrize("classes", [0, 3])
def test_a_folder_of_photos_trains_with_and_without_labels(fastgessl, tmp_path, classes):
    photos = _photos(tmp_path / "photos", 40, classes=classes)
    run = tmp_path / "run"
    options = (
        "digits-simclr",
        "--data.name",
        "folder",
        "--data.root",
        photos,
        *TINY[:4],
        "--train.batch_size",
        16,
        "--train.max_steps",
        2,
    )
    outcome = fastgessl("train", *options, "--evaluate.knn_k", 5, "--train.run_dir", run)
    assert outcome.code == 0, outcome.err
    assert "engine dali" in outcome.out or "engine torchvision" in outcome.out
    row = json.loads((run / "evaluation.json").read_text())["rows"]["this run"]
    assert ("knn" in row) == bool(classes)
    assert {"effective_rank", "alignment", "uniformity", "retrieval"} <= set(row["geometry"])


def test_evaluate_measures_a_finished_run_again(fastgessl, tmp_path):
    run = tmp_path / "run"
    assert fastgessl("train", *GESSL, "--train.run_dir", run).code == 0
    before = json.loads((run / "evaluation.json").read_text())
    outcome = fastgessl("evaluate", run, "--tasks", "knn", "few_labels")
    assert outcome.code == 0, outcome.err
    after = json.loads((run / "evaluation.json").read_text())
    assert {name: row["knn"] for name, row in after["rows"].items()} == {
        name: row["knn"] for name, row in before["rows"].items()
    }
    assert "few_labels" in after["rows"]["this run"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--train.batch_size", 5000), "5000"),
        (("--train.resume", "auto"), "run_dir"),
        (("--train.resume", "auto", "--train.run_dir", "empty"), "no checkpoint"),
        (("--train.resume", "nowhere"), "not a checkpoint"),
        (("--train.run_dir", "occupied"), "not empty"),
        (("--data.root", "missing", "--data.name", "folder"), "missing"),
        (("--data.root", "empty", "--data.name", "folder"), "no images"),
        (("--data.name", "npz"), "data.root"),
        (("--data.name", "npz", "--data.root", "no_images.npz"), "train_x"),
        (("--data.name", "npz", "--data.root", "short_labels.npz"), "train_y"),
        (("--data.name", "cifra10"), "cifar10"),
        (
            (
                "--data.engine",
                "resident",
                "--data.name",
                "folder",
                "--data.root",
                "photos",
                "--train.batch_size",
                16,
            ),
            "resident",
        ),
        (("--views.size", 1000), "1000"),
        (("--model.name", "resnet19"), "resnet18"),
        (("--method.name", "simcrl"), "simclr"),
        (("--evaluate.tasks", "knn", "lineer"), "linear"),
        (("--evaluate.knn_k", 100000), "100000"),
        (("--train.precision", "fp16"), "GPU"),
        (("--train.seed", 5000000000), "less than 2147483648"),
        (("--optim.name", "adamw", "--optim.momentum", 1.0), "less than 1"),
        (("--train.compile", "True", "--gessl.inner_steps", 1), "compile"),
        (("--log.trackers", "tensorbored"), "log.trackers 'tensorbored' is no tracker"),
        pytest.param(
            ("--train.device", "cuda"),
            "GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line_before_any_work(fastgessl, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("mine")
    _photos(tmp_path / "photos", 20)
    images = np.zeros((30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "no_images.npz", other=images)
    np.savez(tmp_path / "short_labels.npz", train_x=images, train_y=np.zeros(29, dtype=np.int64))
    outcome = fastgessl("train", *GESSL, *arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("fastgessl train: ")
    assert expected in outcome.err
    assert (tmp_path / "occupied" / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "runs").exists()
