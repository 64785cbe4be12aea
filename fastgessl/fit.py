"""What a recipe leaves open because it depends on how many images there are. What the user gives is never
touched.
"""

from __future__ import annotations

from fastgessl.config import Config, MethodConfig, UsageError

# Enough for a ResNet-18 to converge on a few thousand photos, a night on one GPU; published CIFAR runs have
# 195,000, ImageNet's 31,000 up.
STEPS = 20_000
EPOCHS = (100, 1000)
BATCHES = (16, 256)
# Longest queue by method, and what a queue of the images themselves would do: MoCo's is of negatives, SwAV's
# balances its assignment.
QUEUES = {
    "moco": (65_536, "so that few negatives are older views of the image itself"),
    "swav": (3_840, "so that few images count twice in a balanced assignment"),
}


def fit_to_images(config: Config, images: int, parts: int = 1) -> tuple[Config, list[str]]:
    """The configuration with batch_size 0, epochs 0 and queue_length -1 filled in for so many images, and a
    line a choice that says why.

    `parts`: processes times micro-batches, of which the batch must be a multiple. Raises UsageError if there
    are too few images.

    >>> from fastgessl.recipes import load
    >>> config, reasons = fit_to_images(load("folder-moco").config, 1200)
    >>> config.train.batch_size, config.train.epochs, config.method.moco.queue_length
    (64, 1000, 576)
    >>> fit_to_images(load("digits-moco").config, 1198)[1]
    []
    """
    train, method, reasons = config.train, config.method, []
    if train.batch_size == 0:
        train = train.model_copy(update={"batch_size": _batch(images, parts)})
        bounds = f"from {BATCHES[0]} to {BATCHES[1]}"
        reasons.append(
            f"train.batch_size {train.batch_size}: the power of two next below a sixteenth of {images} "
            f"images, {bounds}"
        )
    if train.epochs == 0:
        steps = max(images // train.batch_size, 1)
        train = train.model_copy(update={"epochs": min(max(round(STEPS / steps), EPOCHS[0]), EPOCHS[1])})
        reasons.append(
            f"train.epochs {train.epochs}: {STEPS:,} steps at {steps} an epoch, from {EPOCHS[0]} to "
            f"{EPOCHS[1]} epochs"
        )
    if _queue_length(method) < 0:
        forward = train.batch_size // train.accumulate
        longest, why = QUEUES[method.name]
        length = max(min(images // 2, longest) // forward, 1) * forward
        method = _with_queue_length(method, length)
        reasons.append(
            f"method.{method.name}.queue_length {length}: whole batches, half of the images and {longest:,} "
            f"rows at most, {why}"
        )
    return config.model_copy(update={"train": train, "method": method}), reasons


def leaves_open(config: Config) -> bool:
    """Whether something is to be chosen from the number of images."""
    return config.train.batch_size == 0 or config.train.epochs == 0 or _queue_length(config.method) < 0


def as_chosen_before(config: Config, earlier: Config) -> Config:
    """`config` with what it leaves open filled in from the run that it continues: a batch chosen for other
    processes would end elsewhere.

    >>> from fastgessl.recipes import load
    >>> open_again = load("folder-simclr").config
    >>> as_chosen_before(open_again, fit_to_images(open_again, 1200)[0]).train.batch_size
    64
    """
    train = {
        name: getattr(earlier.train, name)
        for name in ("batch_size", "epochs")
        if getattr(config.train, name) == 0
    }
    method = config.method
    if _queue_length(method) < 0:
        method = _with_queue_length(method, _queue_length(earlier.method))
    return config.model_copy(update={"train": config.train.model_copy(update=train), "method": method})


def _queue_length(method: MethodConfig) -> int:
    """Rows of the method's queue; 0 for a method that has none."""
    return getattr(method, method.name).queue_length if method.name in QUEUES else 0


def _with_queue_length(method: MethodConfig, length: int) -> MethodConfig:
    own = getattr(method, method.name).model_copy(update={"queue_length": length})
    return method.model_copy(update={method.name: own})


def _batch(images: int, parts: int) -> int:
    """The power of two next below a sixteenth of the images, within bounds, as a multiple of `parts`."""
    wanted = min(max(2 ** ((images // 16).bit_length() - 1) if images >= 16 else 1, BATCHES[0]), BATCHES[1])
    batch = max(wanted // parts, 1) * parts
    if batch > images:
        raise UsageError(
            f"train.batch_size is left open, and {images} images are too few for a batch of {batch}. Give "
            "--train.batch_size, or more "
            "images."
        )
    return batch
