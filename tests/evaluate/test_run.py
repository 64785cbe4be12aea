"""`fastgessl evaluate` on a run, on timm's models and on files of weights; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import TINY

from fastgessl.evaluate import features, held_out_test

IMAGE_SETTINGS = (
    "--evaluate.finetune_epochs",
    "2",
    "--evaluate.label_fractions",
    "0.1",
    "--evaluate.learning_tasks",
    "1",
    "--evaluate.converged_steps",
    "10",
    "--evaluate.probe_epochs",
    "3",
    "--evaluate.supervised_epochs",
    "2",
    "--evaluate.episodes",
    "20",
)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images of every forward pass of an encoder that is evaluated; raw pixels do not count."""
    batches: list[int] = []
    forward = features._forward

    def counted(encoder, view, *arguments):
        if not isinstance(encoder, features.Pixels):
            batches.append(len(view))
        return forward(encoder, view, *arguments)

    monkeypatch.setattr(features, "_forward", counted)
    return batches


@pytest.fixture
def few(tmp_path) -> tuple[str, ...]:
    """Options that measure on 120 images of four classes instead of the digits."""
    labels = np.arange(120) % 4
    pixels = np.random.default_rng(0).integers(0, 100, (120, 8, 8)) + 40 * labels[:, None, None]
    np.savez(tmp_path / "few.npz", train_x=pixels.astype(np.uint8), train_y=labels)
    return ("--data.name", "npz", "--data.root", str(tmp_path / "few.npz"))


@pytest.fixture
def noise(tmp_path) -> Path:
    """320 images of noise with random labels of ten classes and no test split: whatever is right above 1 in
    10 was looked up.
    """
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "noise.npz",
        train_x=draw.integers(0, 256, (320, 8, 8), dtype=np.uint8),
        train_y=draw.integers(0, 10, 320),
    )
    return tmp_path / "noise.npz"


def measured(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def test_features_are_extracted_once_and_a_changed_checkpoint_invalidates_them(run, fastgessl, encoded):
    assert fastgessl("evaluate", run, "--tasks", "knn").code == 0
    first, images = measured(run), sum(encoded)
    assert images == 2 * (1198 + 599)  # two encoders, both splits
    encoded.clear()

    assert fastgessl("evaluate", run, "--tasks", "knn", "linear_sgd").code == 0
    assert encoded == []
    assert measured(run)["rows"]["this run"]["knn"] == first["rows"]["this run"]["knn"]

    weights = load_file(run / "encoder.safetensors")
    weights["conv1.weight"] = -weights["conv1.weight"]
    save_file(weights, run / "encoder.safetensors")
    assert fastgessl("evaluate", run, "--tasks", "knn").code == 0
    assert sum(encoded) == 1198 + 599
    assert measured(run)["rows"]["this run"]["knn"] != first["rows"]["this run"]["knn"]
    assert measured(run)["rows"]["untrained encoder"]["knn"] == first["rows"]["untrained encoder"]["knn"]


def test_every_task_runs_on_a_run_of_ours_and_stands_in_table_and_json(run, fastgessl, tmp_path):
    shapes = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", train_x=shapes, train_y=np.arange(80) % 4)

    outcome = fastgessl(
        "evaluate",
        run,
        "--tasks",
        "all",
        "--transfer",
        tmp_path / "noise.npz",
        "--evaluate.queries",
        "10",
        *IMAGE_SETTINGS,
    )

    assert outcome.code == 0, outcome.err
    found = measured(run)
    row = found["rows"]["this run"]
    assert set(row) == {
        "features",
        "linear",
        "few_labels",
        "knn",
        "sigma",
        "geometry",
        "linear_sgd",
        "mlp",
        "knn_protocols",
        "label_fractions",
        "few_shot",
        "conditions",
    }
    assert [entry["metric"] for entry in row["knn_protocols"]["protocols"]] == [
        "cosine",
        "cosine",
        "euclidean",
    ]
    assert [entry["shots"] for entry in row["few_shot"]["episodes"]] == [1, 5]
    assert found["transfer"]["noise"]["rows"]["this run"]["linear"]["accuracy"] < 0.7
    assert (
        "takes 200 neighbours, but there are only 64"
        in found["transfer"]["noise"]["skipped"]["knn_protocols"]
    )
    assert (
        0 < found["finetune"]["this run"][0]["accuracy"] <= 1
        and found["finetune"]["this run"][0]["labelled"] == 120
    )
    sigma = found["universality"]["rows"]["this run"]
    assert [task["group"] for task in sigma["tasks"]] == [
        "discriminability",
        "generalisation",
        "transferability",
    ]
    assert sigma["total"] == pytest.approx(sum(task["sigma"] for task in sigma["tasks"]))
    assert [point["step"] for point in found["learning"]] == [9, 18]
    assert all(
        point["sigma"] > 0 and point["loss_after"] < point["loss_before"] for point in found["learning"]
    )
    for words in (
        "Fine-tuned",
        "Universality",
        "Learning universality",
        "euclidean",
        "majority",
        "5-way",
        "noise",
    ):
        assert words in outcome.out
    assert set(json.loads((run / "summary.json").read_text())) >= {"plan", "evaluation"}


def test_sigma_against_a_supervised_model_trains_it_once(run, few, fastgessl, monkeypatch):
    from fastgessl.evaluate.tasks import universality

    trained = []
    train = universality.train_classifier
    monkeypatch.setattr(
        universality, "train_classifier", lambda *args, **kwargs: trained.append(1) or train(*args, **kwargs)
    )
    options = (*few, "--tasks", "universality", "--evaluate.sigma_against", "supervised", *IMAGE_SETTINGS)

    assert fastgessl("evaluate", run, *options).code == 0
    first = measured(run)["universality"]
    assert fastgessl("evaluate", run, *options).code == 0

    assert trained == [1] and measured(run)["universality"] == first
    assert first["target"] == "supervised" and 0.1 < first["task_model_accuracy"]["npz"] <= 1
    assert all(task["target"] == "supervised" for task in first["rows"]["this run"]["tasks"])
    assert fastgessl("evaluate", run, *options, "--evaluate.supervised_epochs", "1").code == 0
    assert trained == [1, 1]


def test_a_timm_model_is_measured_without_a_run(tmp_path, few, fastgessl):
    options = (*few, "--evaluate.weights", "none", "--views.size", "32", "--tasks", "knn")

    outcome = fastgessl("evaluate", "timm:resnet10t", *options, "--evaluate.out", tmp_path / "out")

    assert outcome.code == 0, outcome.err
    found = measured(tmp_path / "out")
    assert set(found["rows"]) == {"raw pixels", "untrained encoder", "timm:resnet10t"}
    assert found["rows"]["timm:resnet10t"]["features"]["width"] == 512


def test_a_timm_model_takes_the_views_its_weights_were_made_for():
    from fastgessl.evaluate.subject import base_config

    config = base_config("timm:vit_tiny_patch16_224")

    assert config.views.size == 224 and config.views.mean == (0.5, 0.5, 0.5)
    assert config.model.name == "vit_tiny_patch16_224"


def test_exported_weights_are_measured_as_the_run_is(run, tmp_path, fastgessl):
    assert fastgessl("evaluate", run, "--tasks", "knn").code == 0
    assert fastgessl("export", run, "--to", "safetensors", "--out", tmp_path / "export").code == 0
    file = tmp_path / "export" / "model.safetensors"

    outcome = fastgessl("evaluate", file, "--tasks", "knn", "--evaluate.out", tmp_path / "out")

    assert outcome.code == 0, outcome.err
    assert measured(tmp_path / "out")["rows"]["model"]["knn"] == measured(run)["rows"]["this run"]["knn"]


def test_a_classifiers_last_layer_is_left_out(run, tmp_path, fastgessl):
    weights = load_file(run / "encoder.safetensors") | {
        "fc.weight": torch.ones(10, 64),
        "fc.bias": torch.ones(10),
    }
    save_file(weights, tmp_path / "classifier.safetensors")
    model = (
        "--model.name",
        "resnet18",
        "--model.stem",
        "small",
        "--model.width",
        "0.125",
        "--views.size",
        "8",
    )

    outcome = fastgessl(
        "evaluate",
        tmp_path / "classifier.safetensors",
        *model,
        "--tasks",
        "geometry",
        "--evaluate.out",
        tmp_path / "out",
    )

    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--tasks", "lineer"), "unknown task 'lineer'. Perhaps you meant linear"),
        (("--tasks", "knn", "--transfer", "digits"), "two data sets are called 'digits'"),
        (("--tasks", "knn", "--transfer", "no/such.npz"), "no/such.npz"),
        (
            ("--tasks", "few_shot", "--evaluate.queries", "500"),
            "Task few_shot: an episode takes 5 classes of 505 images",
        ),
        (("--tasks", "knn", "--evaluate.label_fractions", "0"), "greater than 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, fastgessl, options, expected):
    outcome = fastgessl("evaluate", run, *options)

    assert outcome.code == 2
    assert expected in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("timm:resnet18x", (), "'resnet18x' is no backbone that timm knows. Perhaps you meant resnet18"),
        ("nothing.safetensors", (), "there is no file 'nothing.safetensors'"),
        ("torn.safetensors", (), "cannot be read as safetensors"),
        ("other.safetensors", (), "does not hold the weights of model.name resnet18"),
        (
            "timm:resnet10t",
            (
                "--evaluate.weights",
                "none",
                "--data.name",
                "npz",
                "--data.root",
                "one_class.npz",
                "--views.size",
                "8",
            ),
            "Task linear: all 16 training images are of class 0",
        ),
        (
            "timm:resnet10t",
            (
                "--evaluate.weights",
                "none",
                "--data.name",
                "npz",
                "--data.root",
                "unlabelled.npz",
                "--views.size",
                "8",
            ),
            "Task linear: the training images have no labels",
        ),
        (
            "timm:resnet10t",
            (
                "--evaluate.weights",
                "none",
                "--data.name",
                "npz",
                "--data.root",
                "unseen.npz",
                "--views.size",
                "8",
            ),
            "1 classes of the test images (labels 7) have no training image",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    tmp_path, monkeypatch, fastgessl, target, options, expected
):
    monkeypatch.chdir(tmp_path)
    pixels, labels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8), np.arange(20) % 2
    (tmp_path / "torn.safetensors").write_bytes(b"not a header")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    np.savez("one_class.npz", train_x=pixels, train_y=labels * 0)
    np.savez("unlabelled.npz", train_x=pixels)
    np.savez("unseen.npz", train_x=pixels, train_y=labels, test_x=pixels[:4], test_y=np.array([0, 1, 7, 1]))

    outcome = fastgessl("evaluate", target, "--tasks", "linear", *options)

    assert outcome.code == 2
    assert expected in outcome.err and outcome.err.count("\n") == 1


def test_a_run_without_weights_or_checkpoints_says_so(run, fastgessl):
    shutil.rmtree(run / "checkpoints")
    outcome = fastgessl("evaluate", run, "--tasks", "learning")
    assert outcome.code == 2 and "has no checkpoints" in outcome.err
    (run / "encoder.safetensors").unlink()
    outcome = fastgessl("evaluate", run)
    assert outcome.code == 2 and "has not been trained to its end" in outcome.err


def test_a_method_that_reads_labels_does_not_see_the_images_it_will_be_judged_on(noise, tmp_path, fastgessl):
    sizes = (
        "--views.size",
        "8",
        "--model.width",
        "0.125",
        "--train.batch_size",
        "64",
        "--train.max_steps",
        "100",
    )
    still = (
        "--views.flip_probability",
        "0",
        "--views.jitter_probability",
        "0",
        "--views.blur_probability",
        "0",
    )
    # Views that hardly change and this rate: all 320 labels are learned by heart, and 100 % were right when
    # the fifth was among them.
    by_heart = (
        *still,
        "--views.crop_scale",
        "1",
        "1",
        "--views.grayscale_probability",
        "0",
        "--optim.base_lr",
        "0.5",
    )
    options = (*sizes, *by_heart, "--evaluate.tasks", "linear", "--train.run_dir", tmp_path / "run")

    outcome = fastgessl("train", "npz-supervised", "--data.root", noise, *options)

    assert outcome.code == 0, outcome.err
    found = measured(tmp_path / "run")
    labels = torch.from_numpy(np.load(noise)["train_y"])
    assert found["images"]["test"] == len(held_out_test(labels, 0)[1]) and found["images"]["held_out"] == 1
    # Four standard deviations of 65 guesses above chance.
    assert found["rows"]["this run"]["linear"]["accuracy"] < 0.25
    assert f"held out: {found['images']['test']} of 320 images" in outcome.out


def test_the_online_probe_learns_nothing_from_images_that_are_held_out(noise):
    from accelerate import Accelerator

    from fastgessl.evaluate import OnlineProbe
    from fastgessl.evaluate.run import RunEvaluation
    from fastgessl.evaluate.sources import open_source
    from fastgessl.methods import Outputs
    from fastgessl.recipes import load

    config = load("npz-simclr").config
    data, evaluate = (
        config.data.model_copy(update={"root": noise}),
        config.evaluate.model_copy(update={"every_epochs": 1.0}),
    )
    config = config.model_copy(update={"data": data, "evaluate": evaluate})
    source = open_source("npz", noise)
    evaluation = RunEvaluation(config, source, Accelerator(cpu=True))
    width, labels = evaluation.probe.weight.shape[1], torch.from_numpy(source.train.labels)
    kept, _ = held_out_test(labels, config.train.seed)
    points = torch.randn(320, width, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(320, generator=torch.Generator().manual_seed(1))[:100]
    seen = index[torch.isin(index, kept)]
    assert 0 < len(seen) < 100
    alone = OnlineProbe(width, 10)

    for _ in range(3):
        evaluation.observe(Outputs(points[index][None], points[index][None]), labels[index], index)
        alone.update(points[seen], labels[seen])

    torch.testing.assert_close(evaluation.probe.weight, alone.weight)
    torch.testing.assert_close(evaluation.probe.mean, alone.mean)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of 30 photos; three of the first one are no pictures, and a fourth is gone, with a link
    that leads nowhere.
    """
    draw = np.random.default_rng(0)
    for number in range(60):
        file = tmp_path / "photos" / "ab"[number // 30] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 100 + 2 * number, (9, 9, 3), dtype=np.uint8)).save(file)
    for number in (2, 3, 20):
        (tmp_path / "photos" / "a" / f"{number:02d}.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "a" / "11.png").unlink()
    (tmp_path / "photos" / "a" / "11.png").symlink_to("nowhere.png")
    return tmp_path / "photos"


@pytest.mark.filterwarnings("ignore:data.bad_files skip")
def test_bad_files_are_left_out_and_listed_and_move_no_image_between_train_and_test(run, photos, fastgessl):
    from fastgessl import pipelines

    options = (
        "--data.name",
        "folder",
        "--data.root",
        photos,
        "--data.bad_files",
        "skip",
        "--evaluate.ways",
        "2",
        *IMAGE_SETTINGS,
    )
    names = [path.name for path in pipelines.open_images("folder", photos).paths]
    bad = {names.index(f"{number:02d}.png") for number in (2, 3, 11, 20)}
    held = set(held_out_test(torch.arange(60) // 30, 0)[1].tolist())

    outcome = fastgessl("evaluate", run, *options, "--tasks", "linear", "finetune", "universality")

    assert outcome.code == 0, outcome.err
    found = measured(run)
    assert found["images"] == {
        "train": 60 - len(held | bad),
        "test": len(held - bad),
        "classes": 2,
        "held_out": 1,
    }
    sizes = {task["group"]: task["images"] for task in found["universality"]["rows"]["this run"]["tasks"]}
    assert sizes == {"discriminability": found["images"]["train"], "generalisation": found["images"]["test"]}
    assert {Path(line).name for line in (run / "bad_files.txt").read_text().splitlines()} == {
        names[image] for image in bad
    }

    # The supervised models' rows stand beside those of the features.
    supervised = ("--tasks", "universality", "--evaluate.sigma_against", "supervised")
    assert fastgessl("evaluate", run, *options, *supervised).code == 0
    assert fastgessl("embed", run, photos, "--out", run / "e.npz", "--data.bad_files", "skip").out.startswith(
        "56 images"
    )


def test_a_transfer_set_that_cannot_be_measured_is_refused_before_training(tmp_path, fastgessl):
    np.savez(tmp_path / "unlabelled.npz", train_x=np.zeros((20, 8, 8), dtype=np.uint8))
    options = (*TINY, "--evaluate.transfer", tmp_path / "unlabelled.npz", "--train.run_dir", tmp_path / "run")

    for task in ("knn", "universality"):
        outcome = fastgessl("train", "digits-simclr", *options, "--evaluate.tasks", task)

        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert f"unlabelled: Task {task}: the training images have no labels" in outcome.err
        assert not (tmp_path / "run" / "metrics.jsonl").exists() and "step" not in outcome.err
    assert fastgessl("train", "digits-simclr", *options, "--evaluate.tasks", "geometry").code == 0
