"""What follows from a configuration: what a recipe leaves open, and the plan of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_training import small_config, start

from fastgessl import build, pipelines
from fastgessl.config import MocoConfig, UsageError
from fastgessl.recipes import load


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "images.npz", train_x=np.zeros((184, 8, 8, 3), dtype=np.uint8))
    return tmp_path / "images.npz"


def test_epochs_of_a_broken_number_of_steps_end_with_the_last_whole_step(data, tmp_path):
    # 23 batches of 8 an epoch, ten of them a step: 1,150 batches in 50 epochs.
    train = {"batch_size": 80, "accumulate": 10, "epochs": 50, "max_steps": None}
    plan = start(small_config(data, train=train), tmp_path).plan
    assert (plan.total_steps, plan.steps_per_epoch) == (115, 2.3)


@pytest.mark.parametrize(
    ("recipe", "shuffles", "asked", "planned"),
    [
        ("digits-moco", False, "auto", "synchronised"),
        ("digits-moco", True, "auto", "local"),
        ("digits-moco", True, "local", "local"),
        ("digits-moco-gessl", False, "auto", "local"),
        ("digits-moco", True, "synchronised", None),
    ],
)
def test_keys_that_are_dealt_out_among_ranks_keep_statistics_of_their_own(
    data, recipe, shuffles, asked, planned
):
    base = load(recipe).config
    method, model = (
        base.method.model_copy(update={"moco": MocoConfig(shuffle_batch_norm=shuffles)}),
        base.model.model_copy(update={"batch_norm": asked}),
    )
    config = base.model_copy(update={"method": method, "model": model})
    two = SimpleNamespace(num_processes=2, device="cpu", mixed_precision="no")
    images = pipelines.open_images("npz", data)
    if planned is None:
        with pytest.raises(UsageError, match=r"there is nothing to hide\. Leave out one of the two"):
            build.make_plan(config, images, range(10), two)
    else:
        assert build.make_plan(config, images, range(10), two).batch_norm == planned


@pytest.mark.parametrize(
    ("images", "parts", "batch", "epochs", "queue"),
    [
        (40, 1, 16, 1000, 16),
        (1200, 1, 64, 1000, 576),
        (1200, 3, 63, 1000, 567),
        (20_000, 1, 256, 256, 9984),
        (2_000_000, 8, 256, 100, 65536),
    ],
)
def test_batch_epochs_and_queue_follow_the_number_of_images(images, parts, batch, epochs, queue):
    config, reasons = build.complete(load("folder-moco").config, images, parts)
    assert (config.train.batch_size, config.train.epochs, config.method.moco.queue_length) == (
        batch,
        epochs,
        queue,
    )
    assert [reason.split(":")[0] for reason in reasons] == [
        f"train.batch_size {batch}",
        f"train.epochs {epochs}",
        f"method.moco.queue_length {queue}",
    ]


@pytest.mark.parametrize(("images", "queue"), [(1200, 512), (50_000, 24_832), (1_000_000, 65_536)])
def test_an_npz_s_queue_of_negatives_is_no_longer_than_half_of_its_images(images, queue):
    config, reasons = build.complete(load("npz-moco").config, images)
    assert config.method.moco.queue_length == queue
    assert "negatives are older views" in reasons[0]


@pytest.mark.parametrize(
    ("recipe", "images", "queue"),
    [("folder-swav", 400_000, 3840), ("npz-swav", 400_000, 3840), ("npz-swav", 2000, 768)],
)
def test_swav_s_queue_is_the_published_one_or_what_fits(recipe, images, queue):
    config, reasons = build.complete(load(recipe).config, images)
    assert config.method.swav.queue_length == queue
    assert "negatives" not in reasons[-1] and "balanced assignment" in reasons[-1]


@pytest.mark.parametrize("recipe", ["folder-moco", "npz-moco"])
def test_a_continued_run_keeps_what_was_chosen_on_other_processes(recipe):
    left_open = load(recipe).config
    chosen, _ = build.complete(left_open, 100_000, 32)
    assert build.complete(left_open, 100_000, 24, chosen) == (chosen, [])
    given = left_open.model_copy(
        update={"train": left_open.train.model_copy(update={"batch_size": 96, "epochs": 3})}
    )
    assert build.complete(given, 100_000, 24, chosen)[0].train == given.train


def test_what_the_user_gives_is_kept():
    config = load("folder-moco").config
    train, method = (
        config.train.model_copy(update={"batch_size": 48, "epochs": 7}),
        config.method.model_copy(update={"moco": MocoConfig(queue_length=96)}),
    )
    given = config.model_copy(update={"train": train, "method": method})
    assert build.complete(given, 5000) == (given, [])


def test_a_recipe_that_leaves_nothing_open_is_as_it_was():
    config = load("cifar10-moco").config
    assert build.complete(config, 50_000) == (config, [])


def test_a_queue_holds_whole_micro_batches():
    config = load("folder-swav").config
    train = config.train.model_copy(update={"batch_size": 96, "accumulate": 2})
    fitted, _ = build.complete(config.model_copy(update={"train": train}), 1000)
    assert fitted.method.swav.queue_length == 480


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(UsageError, match="9 images are too few for a batch of 16"):
        build.complete(load("folder-simclr").config, 9)
