"""Every option of a run, with its type, its unit, its range and its default: the only place where a default stands.

One frozen model a concern. `Config` holds them all; a recipe is a partial `Config` in YAML (see `recipes.py`), and the command
line overrides single fields (`--train.batch_size 512`). The docstring under a field is its `--help` text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class UsageError(ValueError):
    """A mistake that its message can mend: what was wrong, what was found, what to do. The command line prints it and exits with 2."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class DataConfig(Section):
    """Where the images come from."""

    name: str = "digits"
    """Data set: digits, npz, folder, cifar10, cifar100, imagenet."""
    root: Path | None = None
    """File or folder that holds the data; digits need none. An .npz has uint8 arrays train_x (N, H, W[, 3]), and if there are any
    train_y, test_x, test_y."""
    engine: Literal["auto", "resident", "dali", "torchvision"] = "auto"
    """What makes the views: resident (arrays on the training device), dali (image files), torchvision (the way out); auto takes
    resident for arrays that fit, else dali where it imports, else torchvision."""
    workers: Positive = 2
    """Threads (dali) or processes (torchvision) that decode images, a rank."""
    resident_limit: PositiveFloat = 16.0
    """Largest data set that the resident engine may keep on the training device, GiB."""


class ViewsConfig(Section):
    """How an image becomes views. A field left empty keeps the preset's value."""

    preset: Literal["simclr", "byol"] = "simclr"
    """Published set of augmentations to start from."""
    size: Annotated[int, Field(ge=8, le=1024)] = 32
    """Side of a view, pixels."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Smallest and largest share of the image's area that a crop keeps."""
    flip_probability: Fraction | None = None
    """Chance of a left-right flip."""
    jitter_probability: Fraction | None = None
    """Chance of colour jitter."""
    jitter_strength: NonNegativeFloat = 1.0
    """Multiplies the preset's brightness, contrast, saturation and hue ranges."""
    grayscale_probability: Fraction | None = None
    """Chance of losing the colour."""
    blur_probability: Fraction | None = None
    """Chance of a Gaussian blur, for every view."""
    solarize_probability: Fraction | None = None
    """Chance of solarisation, for every view."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means that normalisation subtracts, pixel values in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Channel standard deviations that normalisation divides by, pixel values in [0, 1]."""


class ModelConfig(Section):
    """The encoder that is trained and kept."""

    name: str = "resnet18"
    """Backbone, by timm's name."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: the backbone's own; small: 3x3 stride 1 and no max-pooling, for images of about 32 pixels (ResNets)."""
    width: PositiveFloat = 1.0
    """Channel multiplier (ResNets)."""
    batch_norm: Literal["auto", "local", "synchronised"] = "auto"
    """Whose rows batch norm averages over in training: this rank's, or all ranks'. auto: synchronised for plain SSL, local under
    GeSSL, where a task is rank-local."""


class MethodConfig(Section):
    """The self-supervised loss and its heads."""

    name: str = "simclr"
    """Method: see `fastgessl recipes`."""
    temperature: PositiveFloat = 0.5
    """Temperature of the similarity softmax: SimCLR's loss, and the model's output distribution pi under GeSSL."""
    projector_hidden: Positive = 2048
    """Hidden width of the projector."""
    projector_out: Positive = 128
    """Output width of the projector."""
    predictor_hidden: Positive = 4096
    """Hidden width of the predictor (BYOL)."""
    momentum_start: Fraction = 0.99
    """Momentum of the momentum encoder at the first step; a half cosine leads to momentum_end (BYOL)."""
    momentum_end: Fraction = 1.0
    """Momentum of the momentum encoder at the last step (BYOL)."""
    negatives: Literal["auto", "local", "global"] = "auto"
    """Whose images are negatives: this rank's or all ranks'. auto: global for plain SSL, local under GeSSL (SimCLR)."""


class GesslConfig(Section):
    """The bi-level objective. w_sigma = 0 is plain self-supervised learning, in the same code path."""

    inner_steps: Natural = 0
    """K: SGD steps on the task from the present weights to the student."""
    target_steps: Positive = 1
    """lambda: further SGD steps from the student to the self-motivated target."""
    inner_lr: PositiveFloat = 0.01
    """alpha: learning rate of the inner steps; inner_lr_schedule says what it is multiplied by."""
    inner_lr_schedule: Literal["constant", "cosine", "times_lr"] = "constant"
    """alpha over the run: constant; cosine: half a cosine from inner_lr towards 0; times_lr: inner_lr times the outer learning rate of
    the step, its warm-up included."""
    inner_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of the inner SGD, from rest at the present weights; the target goes on with the student's velocity."""
    hypergradient: Literal["exact", "first_order", "finite_difference"] = "exact"
    """How the outer gradient passes through the inner steps: exact (second order), first_order (identity Jacobian),
    finite_difference (central-difference Hessian-vector products)."""
    checkpoint_inner_steps: bool = True
    """exact, K > 1: keep the graph of one inner step at a time and make the others anew. Memory then does not grow with K."""
    scope: Literal["all", "head"] = "all"
    """What the inner steps adapt: every weight, or the heads only (features are then computed once)."""
    every: Positive = 1
    """Compute sigma on every m-th optimiser step."""
    query: Literal["same", "fresh_views"] = "same"
    """Views on which sigma is measured: those of the inner steps, or a further pair of the same images."""
    gate: bool = False
    """Drop sigma on a step whose target has a higher SSL loss than the present weights (delta L > 0)."""
    w_ssl: NonNegativeFloat = 1.0
    """Weight of the SSL loss."""
    w_sigma: NonNegativeFloat = 0.0
    """Weight of sigma, the mean KL divergence from the student to the target."""

    @model_validator(mode="after")
    def _something_to_descend(self) -> GesslConfig:
        if self.w_ssl == 0 and self.w_sigma == 0:
            raise ValueError("w_ssl and w_sigma are both 0, so there is nothing to train. Set one of them above 0.")
        return self


class OptimConfig(Section):
    """The outer optimiser."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """Optimiser: sgd (with momentum), lars, adamw."""
    base_lr: PositiveFloat = 0.03
    """Learning rate for a batch of 256 images; the rate used is printed at the start."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """linear: lr = base_lr * batch_size / 256; none: lr = base_lr."""
    momentum: Fraction = 0.9
    """Momentum of sgd and lars; first-moment decay of adamw."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; never applied to biases and normalisation layers."""
    trust_coefficient: PositiveFloat = 0.001
    """eta of lars."""
    trust_clip: bool = False
    """Clip lars' trust ratio so that it never exceeds the plain learning rate (LARC)."""
    clip_gradient: NonNegativeFloat = 0.0
    """Largest global gradient norm; 0 does not clip."""


class ScheduleConfig(Section):
    """The outer learning rate over time."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Length of the linear warm-up from 0, epochs."""
    end_lr: Fraction = 0.0
    """Learning rate at the last step, as a share of the highest."""


class TrainConfig(Section):
    """The training loop and the run's folder."""

    batch_size: Positive = 256
    """Images of one optimiser step over all processes and all accumulated micro-batches."""
    accumulate: Positive = 1
    """Micro-batches of an optimiser step; each is a task of its own."""
    epochs: Positive = 100
    """Passes over the training images."""
    max_steps: Positive | None = None
    """Stop after this many optimiser steps; the schedules then end there too."""
    seed: Natural = 0
    """Seed of weights, order and views."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the encoder; auto takes bf16 on a GPU and fp32 on a CPU."""
    compile: bool = False
    """torch.compile the encoder; refused where the objective needs second derivatives."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (slower on a GPU)."""
    run_dir: Path | None = None
    """Folder of the run; runs/<recipe>-<time> if not given."""
    checkpoint_every: Natural = 0
    """Optimiser steps between checkpoints; 0 saves at the end of every epoch."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints to keep."""
    resume: str = "never"
    """never, auto (newest checkpoint in run_dir), or a checkpoint's folder."""


class EvaluateConfig(Section):
    """What is measured with the frozen encoder. Empty tasks: all that the data allows."""

    tasks: tuple[str, ...] = ()
    """Tasks: linear, few_labels, knn, sigma (these need labels), geometry."""
    every_epochs: Natural = 0
    """Epochs between k-NN and online-probe reports during training; 0 evaluates at the end only."""
    batch_size: Positive = 256
    """Images a forward pass when features are extracted."""
    labels_per_class: Positive = 10
    """Labelled images a class of the few_labels probe."""
    few_label_draws: Positive = 10
    """Random draws of the labelled images that the few_labels probe averages over."""
    knn_k: Positive = 20
    """Neighbours of the k-NN classifier (cosine, weighted)."""
    knn_temperature: PositiveFloat = 0.07
    """Temperature of the k-NN vote."""


class LogConfig(Section):
    """What is written down during training."""

    every: Positive = 1
    """Optimiser steps between two lines of metrics.jsonl."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers; none is allowed."""


class Config(Section):
    """A complete run."""

    recipe: str = "custom"
    """Name of the recipe that this configuration started from."""
    data: DataConfig = DataConfig()
    """Where the images come from."""
    views: ViewsConfig = ViewsConfig()
    """How an image becomes views."""
    model: ModelConfig = ModelConfig()
    """The encoder."""
    method: MethodConfig = MethodConfig()
    """The self-supervised loss and its heads."""
    gessl: GesslConfig = GesslConfig()
    """The bi-level objective."""
    optim: OptimConfig = OptimConfig()
    """The outer optimiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The outer learning rate over time."""
    train: TrainConfig = TrainConfig()
    """The training loop and the run's folder."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured with the frozen encoder."""
    log: LogConfig = LogConfig()
    """What is written down during training."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} does not divide into train.accumulate {self.train.accumulate} "
                "micro-batches. Choose a multiple."
            )
        return self
