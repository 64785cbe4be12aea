"""From a configuration to the objects of a run. Whatever a user may have got wrong is found here, before any
work is done.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed

from fastgessl import pipelines
from fastgessl.config import Config, UsageError
from fastgessl.distributed import choose_precision
from fastgessl.methods import DSA, Method, RunFacts, build_method
from fastgessl.models import build_backbone, load_weights, synchronise_batch_norm
from fastgessl.models.frozen import run_of
from fastgessl.objective import GeSSL
from fastgessl.objective.gradient_cache import CachedObjective
from fastgessl.pipelines import Loader, ViewSpec
from fastgessl.pipelines.sources.images import Images
from fastgessl.schedules import scaled_learning_rate

# The schedules are arrays with a number a step; a year of 20 steps a second has 6e8.
_MOST_STEPS = 10**9
# Enough for a ResNet-18 to converge on a few thousand photos, a night on one GPU; published CIFAR runs have
# 195,000, ImageNet's 31,000 up.
_STEPS = 20_000
_EPOCHS = (100, 1000)
_BATCHES = (16, 256)
# Longest queue by method, and why it is no longer than half of the images.
_QUEUES = {
    "moco": (65_536, "so that few negatives are older views of the image itself"),
    "swav": (3_840, "so that few images count twice in a balanced assignment"),
}


@dataclass(frozen=True, kw_only=True)
class Plan(RunFacts):
    """What follows from a configuration on this many processes. Printed at the start and kept in
    environment.json.
    """

    world_size: int
    images: int
    peak_learning_rate: float
    batch_norm: Literal["local", "synchronised"]
    engine: str
    engine_reason: str
    precision: str
    precision_reason: str


def complete(
    config: Config, images: int, processes: int = 1, earlier: Config | None = None
) -> tuple[Config, list[str]]:
    """Fill in what a recipe leaves open (batch_size 0, epochs 0, queue_length -1): as in the `earlier`
    configuration that is continued, else from the number of images. What the user gives is never touched.

    Returns the configuration, and for each choice a line that says why. Raises UsageError if there are too
    few images.

    >>> from fastgessl.recipes import load
    >>> config, reasons = complete(load("folder-moco").config, 1200)
    >>> config.train.batch_size, config.train.epochs, config.method.moco.queue_length
    (64, 1000, 576)
    >>> complete(load("digits-moco").config, 1198)[1]
    []
    """
    name = config.method.name
    batch, epochs = config.train.batch_size, config.train.epochs
    queue = getattr(config.method, name).queue_length if name in _QUEUES else 0
    if earlier is not None:
        batch = batch or earlier.train.batch_size
        epochs = epochs or earlier.train.epochs
        queue = getattr(earlier.method, name).queue_length if queue < 0 else queue
    reasons = []
    if batch == 0:
        (smallest, largest), parts = _BATCHES, processes * config.train.accumulate
        wanted = min(max(1 << max((images // 16).bit_length() - 1, 0), smallest), largest)
        batch = max(wanted // parts, 1) * parts
        if batch > images:
            raise UsageError(
                f"train.batch_size is left open, and {images} images are too few for a batch of {batch}. "
                "Give --train.batch_size, or more images."
            )
        reasons.append(
            f"train.batch_size {batch}: the power of two next below a sixteenth of {images} images, from "
            f"{_BATCHES[0]} to {_BATCHES[1]}"
        )
    if epochs == 0:
        steps = max(images // batch, 1)
        epochs = min(max(round(_STEPS / steps), _EPOCHS[0]), _EPOCHS[1])
        reasons.append(
            f"train.epochs {epochs}: {_STEPS:,} steps at {steps} per epoch, from {_EPOCHS[0]} to "
            f"{_EPOCHS[1]} epochs"
        )
    if queue < 0:
        forward = batch // config.train.accumulate
        longest, why = _QUEUES[name]
        queue = max(min(images // 2, longest) // forward, 1) * forward
        reasons.append(
            f"method.{name}.queue_length {queue}: whole batches, at most half of the images and {longest:,} "
            f"rows, {why}"
        )
    train = config.train.model_copy(update={"batch_size": batch, "epochs": epochs})
    method = config.method
    if name in _QUEUES:
        own = getattr(method, name).model_copy(update={"queue_length": queue})
        method = method.model_copy(update={name: own})
    return config.model_copy(update={"train": train, "method": method}), reasons


def view_specs(config: Config) -> tuple[ViewSpec, ...]:
    """The training views: the preset with the recipe's changes."""
    return pipelines.view_preset(**dict(config.views))


def build_loader(config: Config, images: Images, accelerator: Accelerator) -> Loader:
    """The training views of this rank, twice over where sigma is measured on fresh ones; one batch is one
    forward pass of all ranks.
    """
    return pipelines.build(
        images,
        view_specs(config) * (2 if needs_fresh_views(config) else 1),
        batch_size=_images_per_forward(config, accelerator.num_processes),
        engine=config.data.engine,
        device=str(accelerator.device),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=config.train.seed,
        workers=config.data.workers,
        resident_limit=config.data.resident_limit,
        bad_files=config.data.bad_files,
        bad_list=Path(accelerator.project_dir) / "bad_files.txt",
    )


def needs_fresh_views(config: Config) -> bool:
    """Whether sigma is measured on a further pair of views of the same images."""
    return config.gessl.w_sigma > 0 and config.gessl.query == "fresh_views"


def _images_per_forward(config: Config, world_size: int) -> int:
    parts = world_size * config.train.accumulate
    if config.train.batch_size % parts:
        raise UsageError(
            f"train.batch_size {config.train.batch_size} counts the images of a step over all processes; it "
            "does not divide into "
            f"{world_size} processes x {config.train.accumulate} micro-batches. Choose a multiple of {parts}."
        )
    if config.train.batch_size == parts:
        raise UsageError(
            f"train.batch_size {config.train.batch_size} leaves one image for a forward pass of each of "
            f"{world_size} processes: batch norm "
            f"has no batch, and the image nothing to be told from. Choose {2 * parts} or more."
        )
    return config.train.batch_size // config.train.accumulate


def make_plan(config: Config, images: Images, loader: Loader, accelerator: Accelerator) -> Plan:
    """Everything that was derived rather than configured."""
    # In whole numbers: 50 epochs of 23 batches, ten a step, are 115 steps, and 50 * 2.3 is less.
    total_steps = config.train.epochs * len(loader) // config.train.accumulate
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)
    if total_steps > _MOST_STEPS:
        raise UsageError(
            f"train.epochs {config.train.epochs} are {total_steps} steps, more than {_MOST_STEPS:,}. Set "
            "fewer, or train.max_steps."
        )
    engine, reason = pipelines.choose_engine(
        images, config.data.engine, str(accelerator.device), config.data.resident_limit
    )
    precision, precision_reason = choose_precision(config)
    several_plain = accelerator.num_processes > 1 and config.gessl.w_sigma == 0
    negatives = config.method.negatives
    global_views, local_views = pipelines.count_views(view_specs(config))
    return Plan(
        world_size=accelerator.num_processes,
        images=len(images),
        classes=None if images.labels is None else len(images.classes),
        images_per_forward=_images_per_forward(config, accelerator.num_processes),
        global_views=global_views,
        local_views=local_views,
        bi_level=config.gessl.w_sigma > 0,
        steps_per_epoch=len(loader) / config.train.accumulate,
        total_steps=max(total_steps, 1),
        peak_learning_rate=scaled_learning_rate(
            config.optim.base_lr, config.train.batch_size, config.optim.lr_scaling
        ),
        batch_norm=_batch_norm(config, several_plain),
        negatives=("global" if several_plain else "local") if negatives == "auto" else negatives,
        engine=engine,
        engine_reason=reason,
        precision=precision,
        precision_reason=precision_reason,
    )


def _batch_norm(config: Config, several_plain: bool) -> Literal["local", "synchronised"]:
    """Statistics of all ranks for plain training, and of one where a mini-batch is a task or its keys are
    dealt out among ranks.
    """
    shuffles = config.method.name == "moco" and config.method.moco.shuffle_batch_norm
    if config.model.batch_norm == "synchronised" and shuffles:
        raise UsageError(
            "method.moco.shuffle_batch_norm deals images out so that local batch norm does not tell the "
            "batch that a key came in; under model.batch_norm synchronised there is nothing to hide. Leave "
            "out one of the two."
        )
    if config.model.batch_norm != "auto":
        return config.model.batch_norm
    return "synchronised" if several_plain and not shuffles else "local"


def build_model(config: Config, plan: Plan, *, filled_later: bool = False) -> Method:
    """Backbone and method with weights that depend on the seed, and on those that the configuration starts
    from unless a checkpoint's are `filled_later`. UsageError for names that do not exist."""
    config = _without_sources(config) if filled_later else config
    set_seed(config.train.seed)
    backbone = build_backbone(config.model)
    load_weights(backbone, config.model.name, config.model.weights, "model.weights")
    method = build_method(config.method, backbone, plan)
    if config.dsa.weight > 0:
        method = DSA(config.dsa, method, plan, config.views.size)
    if plan.batch_norm == "synchronised":
        synchronise_batch_norm(method)
    able = [part for part in method.modules() if isinstance(part, Method) and part.rings]
    if plan.negatives == "ring" and not able:
        raise UsageError(
            f"method.negatives ring passes keys from rank to rank, and {config.method.name} has none to "
            "pass. Use global, or simclr, mocov3 or cissl."
        )
    for part in able if plan.negatives == "ring" else ():
        part.exchange = "ring"
    return method


def _without_sources(config: Config) -> Config:
    """The same model without the weights that it once started from, which need not be there any longer. A
    helper network that a run has trained is built as that run's configuration says, and keeps its source."""
    model = config.model.model_copy(update={"weights": "none"})
    dsa = (
        config.dsa
        if run_of(config.dsa.helper_weights)
        else config.dsa.model_copy(update={"helper_weights": "none"})
    )
    return config.model_copy(update={"model": model, "dsa": dsa})


def build_objective(config: Config, plan: Plan, *, filled_later: bool = False) -> GeSSL | CachedObjective:
    """The one module that DDP wraps, around `build_model`. UsageError where its settings ask for a second
    derivative that the method does not have."""
    _check_sharding(config, plan)
    method = build_model(config, plan, filled_later=filled_later)
    if config.train.compile:
        method.backbone.compile()
    if not config.train.gradient_cache:
        return GeSSL(method, config.gessl)
    if plan.precision == "fp16":
        raise UsageError(
            "train.gradient_cache goes back through the encoder before GradScaler sees the loss, and "
            "half-precision gradients of a large "
            "batch vanish there. Train with --train.precision bf16 or fp32."
        )
    return CachedObjective(method, config.gessl, config.train.gradient_cache)


def _check_sharding(config: Config, plan: Plan) -> None:
    if config.train.sharding == "none":
        return
    if plan.world_size == 1:
        raise UsageError(
            "train.sharding fsdp spreads the weights over several processes, and there is one. Launch more, "
            "or use none."
        )
    if config.train.compile or plan.precision == "fp16":
        raise UsageError(
            "train.sharding fsdp is tested in eager mode, fp32 and bf16. Leave out --train.compile, and fp16."
        )
