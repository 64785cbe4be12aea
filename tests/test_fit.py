"""What a folder's recipe leaves open is chosen from the number of images, and nothing else is touched."""

import pytest

from fastgessl.config import MocoConfig, UsageError
from fastgessl.fit import as_chosen_before, fit_to_images
from fastgessl.recipes import load


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
    config, reasons = fit_to_images(load("folder-moco").config, images, parts)
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
    config, reasons = fit_to_images(load("npz-moco").config, images)
    assert config.method.moco.queue_length == queue
    assert "negatives are older views" in reasons[0]


@pytest.mark.parametrize(
    ("recipe", "images", "queue"),
    [("folder-swav", 400_000, 3840), ("npz-swav", 400_000, 3840), ("npz-swav", 2000, 768)],
)
def test_swav_s_queue_is_the_published_one_or_what_fits(recipe, images, queue):
    config, reasons = fit_to_images(load(recipe).config, images)
    assert config.method.swav.queue_length == queue
    assert "negatives" not in reasons[-1] and "balanced assignment" in reasons[-1]


@pytest.mark.parametrize("recipe", ["folder-moco", "npz-moco"])
def test_a_run_that_goes_on_keeps_what_was_chosen_on_other_processes(recipe):
    opened = load(recipe).config
    chosen, _ = fit_to_images(opened, 100_000, 32)
    again, reasons = fit_to_images(as_chosen_before(opened, chosen), 100_000, 24)
    assert (again, reasons) == (chosen, [])
    given = opened.model_copy(
        update={"train": opened.train.model_copy(update={"batch_size": 96, "epochs": 3})}
    )
    assert as_chosen_before(given, chosen).train == given.train


def test_what_the_user_gives_is_kept():
    config = load("folder-moco").config
    train = config.train.model_copy(update={"batch_size": 48, "epochs": 7})
    method = config.method.model_copy(update={"moco": MocoConfig(queue_length=96)})
    given = config.model_copy(update={"train": train, "method": method})
    assert fit_to_images(given, 5000) == (given, [])


def test_a_recipe_that_leaves_nothing_open_is_as_it_was():
    config = load("cifar10-moco").config
    assert fit_to_images(config, 50_000) == (config, [])


def test_a_queue_holds_whole_micro_batches():
    config = load("folder-swav").config
    train = config.train.model_copy(update={"batch_size": 96, "accumulate": 2})
    fitted, _ = fit_to_images(config.model_copy(update={"train": train}), 1000, 2)
    assert fitted.method.swav.queue_length == 480


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(UsageError, match="9 images are too few for a batch of 16"):
        fit_to_images(load("folder-simclr").config, 9)


def test_a_folder_s_run_says_what_was_chosen_and_records_it(tmp_path, fastgessl):
    import numpy as np
    from PIL import Image

    from fastgessl.runs import read_config

    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(20):
        Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{number}.png"
        )
    options = "--data.engine torchvision --data.workers 1 --views.size 16 --model.width 0.125 --train.max_steps 1 --evaluate.tasks geometry"
    words = ["--data.root", tmp_path / "photos", "--train.run_dir", tmp_path / "run", *options.split()]
    outcome = fastgessl("train", "folder-simclr", *words)
    assert outcome.code == 0, outcome.err
    assert "chosen: train.batch_size 16: the power of two next below a sixteenth of 20 images" in outcome.out
    config = read_config(tmp_path / "run")
    assert (config.train.batch_size, config.train.epochs) == (16, 1000)
