import re
from xml.etree import ElementTree

import pytest

from fastgessl.config import Config, EvaluateConfig
from fastgessl.report.page import configuration, evaluation_tables


def task(group: str, sigma: float) -> dict:
    return {
        "task": "digits",
        "group": group,
        "sigma": sigma,
        "accuracy": 0.5,
        "target": "labels",
        "probe": "mlp",
        "images": 9,
    }


@pytest.fixture
def evaluation() -> dict:
    """As evaluation.json has it, with a crowding ratio that was infinite and a row whose name is markup."""
    row = {
        "features": {"width": 64},
        "knn": {"accuracy": 0.915, "k": 20, "temperature": 0.07, "metric": "cosine"},
        "geometry": {
            "effective_rank": 12.34,
            "alignment": 0.1,
            "uniformity": -1.5,
            "retrieval": 0.25,
            "images": 9,
            "crowding": None,
        },
    }
    return {
        "rows": {"<b>row</b>": row},
        "tasks": ["knn", "geometry"],
        "skipped": {},
        "images": {"train": 100, "test": 50, "classes": 2, "held_out": 0},
        "settings": EvaluateConfig(tasks=("knn", "geometry")).model_dump(mode="json")
        | {"an_option_of_another_version": 1},
        "finetune": {
            "<b>row</b>": [
                {"fraction": 0.1, "labelled": 10, "accuracy": 0.625, "epochs": 3, "layer_decay": 0.75}
            ]
        },
        "universality": {
            "rows": {
                "<b>row</b>": {
                    "tasks": [task("generalisation", 0.25), task("transferability", 0.5)],
                    "total": 0.75,
                }
            },
            "target": "labels",
            "task_model_accuracy": {},
        },
        "learning": [
            {
                "step": 18,
                "sigma": 0.0123,
                "deviation": 0.002,
                "loss_before": 5.5,
                "loss_after": 4.25,
                "converged": 2,
                "tasks": 3,
            }
        ],
    }


def test_every_number_of_an_evaluation_stands_in_its_table(evaluation):
    shown = evaluation_tables(evaluation)

    for number in (
        "91.5",
        "12.3",
        "inf",
        "62.5",
        "0.250",
        "0.750",
        "0.0123±0.0020",
        "5.500",
        "4.250",
        "100 training images, 50 test",
    ):
        assert number in shown, number
    assert "<b>" not in shown and "&lt;b&gt;row" in shown
    ElementTree.fromstring(f"<all>{shown.replace('<br>', '<br/>')}</all>")


def test_transfer_has_a_table_of_its_own(evaluation):
    further = {
        "transfer": {
            "<i>": {key: evaluation[key] for key in ("rows", "tasks", "skipped", "images", "settings")}
        }
    }

    assert "&lt;i&gt;: 100 training images" in evaluation_tables(evaluation | further)


def test_what_was_not_measured_says_how_to_measure_it():
    assert "has not been trained to its end" in evaluation_tables({})


def test_options_that_differ_from_the_default_are_marked():
    config = Config(recipe="a & b")
    shown = configuration(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})}))

    assert re.findall(r'<tr class=changed><th scope="row">(\w+)</th><td>(\w+)', shown) == [("epochs", "3")]
    assert "a &amp; b" in shown
