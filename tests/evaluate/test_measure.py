import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from fastgessl import pipelines
from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate import (
    EvaluationData,
    Features,
    OnlineProbe,
    effective_rank,
    evaluate,
    extract_features,
    few_label_probe,
    fit_probe,
    held_out_test,
    knn_classify,
    linear_probe,
    measure_geometry,
    monitor,
    sigma_to_labels,
)
from fastgessl.evaluate import (
    features as feature_module,
)
from fastgessl.evaluate import (
    tasks as task_plan,
)
from fastgessl.evaluate.features import RowFeatures
from fastgessl.evaluate.sources import DataFacts
from fastgessl.evaluate.tasks import TASKS, named_tasks, plan_tasks

DEFAULT_TASKS = tuple(name for name, task in TASKS.items() if task.default)

SETTINGS = EvaluateConfig(knn_k=3, labels_per_class=4, few_label_draws=3)


def pictures(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (N, 3, 6, 6) on a pattern for each class, and labels."""
    labels = torch.arange(count) % classes
    patterns = torch.randn(classes, 3, 6, 6, generator=torch.Generator().manual_seed(99))
    return patterns[labels] + 2 * torch.randn(
        count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)
    ), labels


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU())


@pytest.fixture
def data(loader):
    images, labels = pictures(90, 3, seed=0)
    pair = [
        images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 6)
    ]
    test_images, test_labels = pictures(60, 3, seed=1)
    return EvaluationData(loader([images], labels), loader([test_images], test_labels), loader(pair, labels))


def printed(report, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


def test_the_report_holds_what_each_measurement_gives_alone(data):
    report = evaluate({"raw pixels": "pixels", "this run": encoder()}, data, SETTINGS, seed=2)

    assert report.tasks == DEFAULT_TASKS and not report.skipped
    for name, take in (
        ("raw pixels", feature_module.Pixels()),
        ("this run", encoder()),
    ):
        train, test = (extract_features(take, part, "cpu") for part in (data.train, data.test))
        row = report.rows[name]
        assert row["linear"]["accuracy"] == linear_probe(train, test, seed=2)["accuracy"]
        assert row["few_labels"]["draws"] == few_label_probe(train, test, 4, seed=2, repeats=3)["draws"]
        assert row["knn"] == {
            "accuracy": knn_classify(train, test, 3, 0.07),
            "k": 3,
            "temperature": 0.07,
            "metric": "cosine",
        }
        assert (
            row["sigma"]["generalisation"]
            == sigma_to_labels(train, test, fit_probe(train, seed=2))["generalisation"]
        )
    assert report.rows["raw pixels"]["features"] == {"width": 108}
    assert report.rows["raw pixels"]["geometry"]["images"] == 90


def test_geometry_is_that_of_the_two_augmented_views(data):
    report = evaluate({"raw pixels": "pixels"}, data, EvaluateConfig(tasks=("geometry",)))
    first, second = (torch.cat([batch.views[view].flatten(1) for batch in data.views]) for view in (0, 1))

    measured = report.rows["raw pixels"]["geometry"]

    expected = measure_geometry(first, second)
    assert measured["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-6)
    assert (measured["alignment"], measured["retrieval"]) == (
        pytest.approx(expected["alignment"]),
        expected["retrieval"],
    )


def test_geometry_of_many_images_is_measured_on_a_seeded_sample(data, monkeypatch):
    monkeypatch.setattr(feature_module, "VIEWED_IMAGES", 20)
    measured = [
        evaluate({"x": "pixels"}, data, EvaluateConfig(tasks=("geometry",)), seed).rows["x"]["geometry"]
        for seed in (0, 0, 1)
    ]

    assert measured[0]["images"] == 20
    assert measured[0] == measured[1] != measured[2]


def test_images_of_one_class_have_no_crowding_ratio(data, loader):
    images, labels = pictures(30, 3, seed=0)

    report = evaluate(
        {"x": "pixels"}, EvaluationData(loader([images], labels * 0), None, data.views), SETTINGS
    )

    assert report.tasks == ("geometry",)
    assert "crowding" not in report.rows["x"]["geometry"] and "crowd." not in printed(report)


def test_json_is_plain_and_without_nan(data):
    report = evaluate(
        {"raw pixels": "pixels", "collapsed": nn.Sequential(nn.Flatten(), Constant())}, data, SETTINGS
    )

    text = json.dumps(report.to_json(), allow_nan=False)

    assert json.loads(text)["rows"]["collapsed"]["geometry"]["crowding"] is None
    assert report.rows["collapsed"]["geometry"]["crowding"] == math.inf
    assert json.loads(text)["rows"]["raw pixels"]["knn"]["k"] == 3
    assert json.loads(text)["settings"]["labels_per_class"] == 4


class Constant(nn.Module):
    def forward(self, pixels):
        return torch.ones(len(pixels), 4)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_row_with_k_temperature_and_metric(data, width):
    report = evaluate(
        {"raw pixels": "pixels", "untrained encoder": encoder(), "this run": encoder()}, data, SETTINGS
    )

    text = printed(report, width)

    for piece in (
        "cosine",
        "k 3",
        "T 0.07",
        "4 labels",
        "raw pixels",
        "(108)",
        "this run",
        "90 training images, 60 test, 3 classes",
    ):
        assert piece in text
    row = next(line for line in text.splitlines() if line.strip().startswith("raw pixels"))
    measured = report.rows["raw pixels"]
    assert f"{100 * measured['linear']['accuracy']:.1f}" in row
    assert f"{measured['sigma']['generalisation']:.3f}" in row
    assert "…" not in text


def test_data_without_labels_is_measured_by_geometry_alone_and_the_table_says_why(loader):
    images, _ = pictures(30, 3, seed=0)
    unlabelled = EvaluationData(loader([images], None), None, loader([images, images + 0.1], None))

    report = evaluate({"raw pixels": "pixels", "this run": encoder()}, unlabelled, SETTINGS)

    assert report.tasks == ("geometry",)
    assert set(report.rows["this run"]) == {"features", "geometry"}
    assert "crowding" not in report.rows["this run"]["geometry"]
    text = " ".join(printed(report).split())
    assert "30 images without labels" in text
    assert "not run: linear, few_labels, knn, sigma: the training images have no labels" in text
    features = extract_features(encoder(), unlabelled.train, "cpu")
    assert set(monitor(RowFeatures(features, features), SETTINGS)) == {"effective_rank"}


def test_without_a_test_split_a_seeded_stratified_fifth_is_held_out(loader):
    images, labels = pictures(90, 3, seed=0)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    kept, held = held_out_test(labels, seed=4)
    whole = EvaluationData(loader([images], labels, order=order))
    split = EvaluationData(loader([images[kept]], labels[kept]), loader([images[held]], labels[held]))

    report = evaluate({"x": "pixels"}, whole, SETTINGS, seed=4)

    assert not held.equal(held_out_test(labels, seed=5)[1])
    assert report.images == {"train": 72, "test": 18, "classes": 3, "held_out": 1}
    assert report.rows == evaluate({"x": "pixels"}, split, SETTINGS, seed=4).rows
    assert "18 held out of the training images" in " ".join(printed(report).split())


def test_images_that_are_held_out_by_number_stay_so_where_others_are_missing():
    present = torch.tensor([1, 2, 5, 6, 9])
    features = Features(present[:, None].float(), present % 2, present)

    kept, held = features.hold_out(torch.tensor([0, 2, 9]))

    assert (kept.index.tolist(), held.index.tolist()) == ([1, 5, 6], [2, 9])
    assert held.features.flatten().tolist() == [2, 9] and held.labels.tolist() == [0, 1]


def test_no_test_label_reaches_a_choice_in_an_evaluation(data, loader):
    images, labels = pictures(60, 3, seed=1)
    blind = EvaluationData(
        data.train,
        loader([images], labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]),
        data.views,
    )

    honest, shuffled = (evaluate({"x": "pixels"}, part, SETTINGS).rows["x"] for part in (data, blind))

    for task in ("linear", "few_labels"):
        assert shuffled[task]["accuracy"] < honest[task]["accuracy"]
        assert all(
            shuffled[task][choice] == honest[task][choice]
            for choice in ("weight_decay", "labelled", "converged")
        )
    assert shuffled["sigma"]["discriminability"] == honest["sigma"]["discriminability"]
    assert shuffled["geometry"] == honest["geometry"]


def test_evaluation_repeats_to_the_last_digit_and_leaves_the_encoder_alone(data):
    net = encoder().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    first, second = (evaluate({"raw pixels": "pixels", "x": net}, data, SETTINGS).to_json() for _ in range(2))

    assert first == second
    assert net.training and all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_an_unknown_task_is_refused_with_the_nearest_and_all_known_ones_before_an_image_is_read():
    unread = EvaluationData(train=(pytest.fail("an image was read") for _ in range(1)))

    with pytest.raises(
        UsageError,
        match=r"unknown task 'liner'\. Perhaps you meant linear\. Known tasks: linear, few_labels, knn",
    ):
        evaluate({"x": "pixels"}, unread, EvaluateConfig(tasks=("knn", "liner")))
    with pytest.raises(UsageError, match=r"unknown task 'zzz'\. Known tasks"):
        named_tasks(["zzz"])


@pytest.mark.parametrize(
    ("task", "train", "test", "message"),
    [
        ("linear", None, None, "the training images have no labels"),
        ("sigma", [0, 0, 0], [0], "all 3 training images are of class 0"),
        ("knn", [0, 1], [0, 4], "1 classes of the test images .labels 4. have no training image"),
        ("knn", [0, 1], [0], "knn_k is 3, but there are only 2"),
        ("few_labels", [0, 1, 1, 1, 1], [0], "labels_per_class is 4, but class 0 has only 1"),
        ("geometry", [0, 1], [0], "no loader of augmented views"),
    ],
)
def test_what_the_data_does_not_allow_is_an_error_if_asked_for_and_skipped_with_the_reason_if_not(
    task, train, test, message
):
    train, test = (None if labels is None else torch.tensor(labels) for labels in (train, test))

    with pytest.raises(UsageError, match=f"Task {task}: .*{message}"):
        plan_tasks(EvaluateConfig(tasks=(task,), knn_k=3, labels_per_class=4), DataFacts(train, test))
    planned, skipped = plan_tasks(SETTINGS, DataFacts(train, test))
    tasks = [each.name for each in planned]
    assert task not in tasks and message.split(".")[0] in skipped[task]
    assert set(tasks) | set(skipped) == set(DEFAULT_TASKS)


@pytest.mark.parametrize(
    ("images", "classes", "width", "slow"),
    [(1_281_167, 1000, 2048, {"linear", "sigma", "few_labels", "knn"}), (50_000, 10, 512, set())],
)
def test_what_would_take_hours_waits_to_be_asked_for(images, classes, width, slow):
    train, test = torch.arange(images) % classes, torch.arange(50_000) % classes

    facts = DataFacts(train, test, views=True, width=width)
    planned, skipped = plan_tasks(EvaluateConfig(), facts)
    (asked,), _ = plan_tasks(EvaluateConfig(tasks=("linear",)), facts)
    tasks = [task.name for task in planned]

    assert set(skipped) == slow and set(tasks) == set(DEFAULT_TASKS) - slow
    assert asked.name == "linear"
    assert all(reason.endswith(f"Ask for it: --evaluate.tasks {task}.") for task, reason in skipped.items())


def test_the_plan_knows_the_width_of_its_rows(data, monkeypatch):
    monkeypatch.setattr(task_plan, "SECONDS_UNASKED", 90 * 50 * 3 * 8e-8)

    assert "linear" in evaluate({"x": encoder()}, data, SETTINGS).tasks
    assert "linear" in evaluate({"x": encoder(), "y": "pixels"}, data, SETTINGS).skipped


def test_features_that_are_nan_are_refused_with_the_rows_name(data):
    broken = encoder()
    nn.init.constant_(broken[1].bias, float("nan"))

    with pytest.raises(
        UsageError, match="Row 'this run': the features of 90 of 90 images are NaN or infinite"
    ):
        evaluate({"raw pixels": "pixels", "this run": broken}, data, SETTINGS)


def test_geometry_refuses_a_loader_of_other_than_two_views(data, loader):
    images, _ = pictures(30, 3, seed=0)

    with pytest.raises(ValueError, match="yields 1 views an image; geometry takes two"):
        evaluate({"x": "pixels"}, EvaluationData(data.train, data.test, loader([images], None)), SETTINGS)


def test_the_table_says_when_a_fit_did_not_converge(data, monkeypatch):
    monkeypatch.setattr("fastgessl.evaluate.tasks.linear.MAX_ITERATIONS", 1)

    text = " ".join(printed(evaluate({"x": "pixels"}, data, EvaluateConfig(tasks=("linear",)))).split())

    assert "the fit stopped before it converged: x: linear" in text


def test_monitor_is_k_nn_and_the_online_probe_on_the_same_images(data):
    net, probe = encoder(), OnlineProbe(16, 3)
    train, test = (extract_features(net, part, "cpu") for part in (data.train, data.test))
    probe.update(train.features, train.labels)

    measured = monitor(RowFeatures(train, test), SETTINGS, probe)

    rank = effective_rank(train.features)
    assert measured == {
        "effective_rank": rank,
        "knn": knn_classify(train, test, 3, 0.07),
        "online_probe": probe.accuracy(test),
    }
    assert set(monitor(RowFeatures(train, test), EvaluateConfig(knn_k=91))) == {"effective_rank"}


def test_the_pipelines_loaders_are_taken_as_they_are():
    pixels, labels = (
        np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        np.arange(40) % 2,
    )
    images = pipelines.ArrayImages(images=pixels, labels=labels.astype(np.int64), classes=("even", "odd"))
    build = {
        "batch_size": 16,
        "engine": "resident",
        "device": torch.device("cpu"),
        "seed": 0,
        "training": False,
    }
    still = pipelines.evaluation_view(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pair = pipelines.view_preset("simclr", 8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    data = EvaluationData(
        pipelines.build(images, [still], **build), None, pipelines.build(images, pair, **build)
    )

    report = evaluate({"raw pixels": "pixels"}, data, SETTINGS)

    assert report.tasks == DEFAULT_TASKS
    torch.testing.assert_close(
        extract_features(feature_module.Pixels(), data.train, "cpu").features,
        torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1) / 127.5 - 1,
        rtol=1e-5,
        atol=1e-5,
    )
