import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from fastgessl import pipelines
from fastgessl.config import Config, EvaluateConfig, ModelConfig, UsageError, ViewsConfig
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.sources import numbered
from fastgessl.evaluate.tasks.finetune import build_classifier, finetune, train_classifier
from fastgessl.models import build_backbone

SETTINGS = EvaluateConfig(finetune_epochs=8, finetune_lrs=(1e-2, 1e-6), layer_decay=0.9)


class Unaugmented(Extractor):
    """Trains on the images as they are: at an edge is what their class is told by."""

    @property
    def pair(self) -> list[pipelines.ViewSpec]:
        return [self.still]


def extractor(**settings: object) -> Extractor:
    config = Config(
        views=ViewsConfig(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        evaluate=SETTINGS.model_copy(update=settings),
    )
    return Unaugmented(config, Accelerator(cpu=True, project_dir="."))


def pictures(count: int, seed: int) -> pipelines.ArrayImages:
    """Images brighter at one of three edges: class 3, 5 or 8."""
    generator, place = np.random.default_rng(seed), np.arange(count) % 3
    pixels = generator.integers(0, 190, (count, 8, 8, 3))
    pixels[place == 0, :2] += 60
    pixels[place == 1, -2:] += 60
    pixels[place == 2, :, :2] += 60
    return pipelines.ArrayImages(pixels.astype(np.uint8), np.array([3, 5, 8])[place], tuple("0123456789"))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(ModelConfig(stem="small", width=0.125))


def test_fine_tuning_learns_on_a_copy_and_takes_the_rate_that_validates_best():
    net = encoder()
    before = copy.deepcopy(net.state_dict())

    result = finetune(net, (pictures(120, 0), pictures(60, 1)), 0.5, extractor())

    assert result["labelled"] == 60 and result["lr"] == 1e-2
    assert result["validation"][1e-2] > result["validation"][1e-6]
    assert result["accuracy"] > 0.5
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_no_test_label_reaches_the_choice_of_a_rate():
    test = pictures(60, 1)
    shuffled = pipelines.ArrayImages(
        test.images, np.random.default_rng(0).permutation(test.labels), test.classes
    )

    train, short = pictures(60, 0), extractor(finetune_epochs=2)

    honest, blind = (finetune(encoder(), (train, part), 1.0, short) for part in (test, shuffled))

    assert (blind["lr"], blind["validation"]) == (honest["lr"], honest["validation"])
    assert blind["accuracy"] != honest["accuracy"]


def test_lower_layers_move_less_under_layer_decay():
    def moved(decay: float) -> tuple[float, float]:
        net = encoder()
        start = {name: value.clone() for name, value in net.named_parameters()}
        images = numbered(pictures(60, 0), torch.tensor([3, 5, 8]))
        train_classifier(build_classifier(net, 3), images, extractor(), epochs=1, lr=1e-2, layer_decay=decay)
        end = dict(net.named_parameters())
        return tuple(
            (end[name] - start[name]).abs().mean().item()
            for name in ("conv1.weight", "layer4.1.conv2.weight")
        )

    (even_first, even_last), (first, last) = moved(1.0), moved(0.5)

    assert first / last < 0.05 * even_first / even_last


def test_layers_that_nobody_knows_cannot_decay():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    backbone.num_features = 4

    with pytest.raises(
        UsageError,
        match=r"layer_decay 0.5 needs a backbone whose layers timm knows.* Use --evaluate.layer_decay 1",
    ):
        classifier, images = build_classifier(backbone, 3), pictures(60, 0)
        train_classifier(classifier, images, extractor(), epochs=1, lr=1e-2, layer_decay=0.5)


def test_images_without_labels_are_refused():
    unlabelled = pipelines.ArrayImages(pictures(10, 0).images)

    with pytest.raises(UsageError, match="Task finetune: the training images have no labels"):
        finetune(encoder(), (unlabelled, pictures(10, 0)), 0.5, extractor())
