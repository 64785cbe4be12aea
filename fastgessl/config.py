"""Every option of a run, with its type, its unit, its range and its default: the only place where a default
stands.

One frozen model a concern. `Config` holds them all; a recipe is a partial `Config` in YAML (see
`recipes.py`), and the command line overrides single fields (`--train.batch_size 512`). The docstring under a
field is its `--help` text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A single number is a tuple of one, so that a recipe may leave out the brackets.
Fractions = Annotated[
    tuple[Fraction, ...],
    Field(min_length=1),
    BeforeValidator(lambda given: (given,) if isinstance(given, int | float) else given),
]


class UsageError(ValueError):
    """A mistake that its message can mend: what was wrong, what was found, what to do. The command line
    prints it and exits with 2.
    """

    mendable = True


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _shows(cls, values: Any) -> Any:
        """Words that a terminal would obey, and file names that the system refuses, stop here: a recipe file
        may come from anyone.
        """
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str | Path) and not str(value).isprintable():
                raise ValueError(
                    f"{str(key)[:80]!r} holds characters that cannot be shown, {str(value)[:80]!r}. Leave "
                    "them out."
                )
        return values


class DataConfig(Section):
    """Where the images come from."""

    name: str = "digits"
    """Data set. Your own: npz, folder, list, shards. By name: digits, cifar10, cifar100, stl10,
    stl10_unlabeled, tinyimagenet, imagenet100, imagenet, flowers102, food101, aircraft."""
    root: Path | None = None
    """File or folder that holds the data; digits need none. An .npz has uint8 arrays train_x (N, H, W[, 3]),
    and if there are any train_y, test_x, test_y; a list is a text file of paths; shards are WebDataset's tar
    files."""
    engine: Literal["auto", "resident", "dali", "torchvision"] = "auto"
    """What makes the views: resident (arrays on the training device), dali (image files), torchvision (the
    way out); auto takes resident for arrays that fit, else dali where it imports, else torchvision."""
    workers: Positive = 2
    """Threads (dali) or processes (torchvision) that decode images, a rank."""
    resident_limit: PositiveFloat = 16.0
    """Largest data set that the resident engine may keep on the training device, GiB."""
    bad_files: Literal["error", "skip"] = "error"
    """An image that cannot be decoded: error stops the run and names it; skip shows another in its place and
    lists it in the run's bad_files.txt."""


class ViewsConfig(Section):
    """How an image becomes views. A field left empty keeps the preset's value."""

    preset: Literal["simclr", "moco", "byol", "barlow", "swav", "dino", "dissl"] = "simclr"
    """Published set of augmentations to start from."""
    size: Annotated[int, Field(ge=8, le=1024)] = 32
    """Side of a global view, pixels."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Smallest and largest share of the image's area that the crop of a global view keeps."""
    global_views: Positive | None = None
    """Views of the full size; the preset's (2) are repeated in turn."""
    local_views: Natural | None = None
    """Further, smaller views (multi-crop); 0 leaves out the preset's."""
    local_size: Annotated[int, Field(ge=2, le=1024)] | None = None
    """Side of a local view, pixels, at most size; 96 / 224 of size if not given."""
    local_crop_scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Smallest and largest share of the image's area that the crop of a local view keeps."""
    flip_probability: Fraction | None = None
    """Chance of a left-right flip."""
    jitter_probability: Fraction | None = None
    """Chance of colour jitter."""
    jitter_strength: NonNegativeFloat = 1.0
    """Multiplies the preset's brightness, contrast, saturation and hue ranges."""
    color: Literal["torchvision", "yiq"] = "torchvision"
    """How jitter and grayscale are done: torchvision's operations, whatever the engine; or DALI's own, faster
    on a CPU, with hue in YIQ and in one order (the dali engine only)."""
    grayscale_probability: Fraction | None = None
    """Chance of losing the colour."""
    blur_probability: Fractions | None = None
    """Chance of a Gaussian blur: one number for every view, or one a global view, and perhaps one more for
    all local views."""
    solarize_probability: Fractions | None = None
    """Chance of solarisation: one number or several, as for the blur."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means that normalisation subtracts, pixel values in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Channel standard deviations that normalisation divides by, pixel values in [0, 1]."""


class ModelConfig(Section):
    """The encoder that is trained and kept."""

    name: str = "resnet18"
    """Backbone, by timm's name."""
    stem: Literal["imagenet", "medium", "small"] = "imagenet"
    """imagenet: the backbone's own; medium: 3x3 stride 1 before the max-pooling, for about 64 pixels; small:
    without it, for about 32 (ResNets)."""
    width: PositiveFloat = 1.0
    """Channel multiplier (ResNets)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: chance that the last residual branch is left out, and linearly less before it. A
    momentum encoder drops none."""
    dimension: Positive | None = None
    """Width of the representation; None is the backbone's own. A wider one is reached through a bottleneck of
    channels (ResNets)."""
    dimension_bottleneck: Positive = 512
    """Channels of that bottleneck."""
    weights: str = "none"
    """What the encoder starts from: none (random), pretrained (timm's, fetched once), a .safetensors file, or
    the folder of a run."""
    batch_norm: Literal["auto", "local", "synchronised"] = "auto"
    """Whose rows batch norm averages over in training: this rank's, or all ranks'. auto: synchronised for
    plain SSL, local under GeSSL, where a task is rank-local, and under method.moco.shuffle_batch_norm."""


class BarlowConfig(Section):
    """Barlow Twins."""

    projector_layers: Positive = 2
    """Linear layers of the projector."""
    redundancy_weight: NonNegativeFloat = 0.0051
    """lambda: weight of the off-diagonal terms."""
    loss_scale: PositiveFloat = 1.0
    """Factor on the loss, which the published runs scale down."""


class MocoConfig(Section):
    """MoCo v2 and v2+."""

    queue_length: Annotated[int, Field(ge=-1)] = 4096
    """Keys of earlier batches that are kept per view as negatives. -1 is chosen from the number of images."""
    symmetric: bool = True
    """Both views query the momentum encoder of the other (v2+), or the first view only (v2)."""
    shuffle_batch_norm: bool = False
    """Deal the momentum encoder's images out among ranks, so that batch norm, which it makes local, tells
    nothing of the batch they came in; with one process there is nobody to deal to."""


class SwavConfig(Section):
    """SwAV."""

    prototypes: Annotated[int, Field(ge=2)] = 3000
    """Prototypes that images are assigned to."""
    sinkhorn_epsilon: PositiveFloat = 0.05
    """Temperature of the balanced assignment."""
    sinkhorn_iterations: Positive = 3
    """Steps of the balanced assignment."""
    queue_length: Annotated[int, Field(ge=-1)] = 4096
    """Projections of earlier batches that are kept per view and balanced with the batch; 0 is none. -1 is
    chosen from the number of images."""
    queue_start_epoch: NonNegativeFloat = 15.0
    """Epochs before the rows that enter the queue are counted; it is used once it is full of counted ones."""
    freeze_epochs: NonNegativeFloat = 1.0
    """Epochs in which the prototypes are not trained."""


class DinoConfig(Section):
    """DINO."""

    prototypes: Annotated[int, Field(ge=2)] = 3000
    """Outputs of the last layer."""
    teacher_temperature: PositiveFloat = 0.04
    """Temperature of the teacher's softmax after its warm-up."""
    teacher_temperature_start: PositiveFloat = 0.04
    """Temperature of the teacher's softmax at the first step."""
    teacher_warmup_epochs: NonNegativeFloat = 0.0
    """Epochs from teacher_temperature_start to teacher_temperature, in a straight line."""
    head_norm: bool = False
    """Batch norm in the head's hidden layers."""
    center_momentum: Fraction = 0.9
    """Share of the centre that stays at each step."""
    freeze_epochs: NonNegativeFloat = 1.0
    """Epochs in which the last layer is not trained."""


class DisslConfig(Section):
    """DISSL."""

    prototypes: Annotated[int, Field(ge=2)] = 3000
    """Equivalence classes that images are assigned to."""
    assignment_temperature: PositiveFloat = 0.5
    """Temperature of the teacher's assignment."""
    entropy_weight: NonNegativeFloat = 2.3
    """lambda: weight of the mean assignment's entropy."""
    invariance_weight: NonNegativeFloat = 0.8
    """beta: weight of the cross-entropy between an image's two assignments."""


class MethodConfig(Section):
    """The self-supervised loss and its heads: what methods share. What one method has alone is in the section
    of its name.
    """

    name: str = "simclr"
    """Method: see `fastgessl recipes`."""
    temperature: PositiveFloat = 0.5
    """Temperature of the student's softmax: over similarities or prototypes in the loss, and in the output
    distribution pi under GeSSL."""
    projector_hidden: Positive = 2048
    """Hidden width of the projector."""
    projector_out: Positive = 128
    """Output width of the projector."""
    predictor_hidden: Positive = 4096
    """Hidden width of the predictor, in a method that has one."""
    momentum_start: Fraction = 0.99
    """Momentum of the momentum encoder, in a method that has one, at the first step; a half cosine leads to
    momentum_end."""
    momentum_end: Fraction = 1.0
    """Momentum of the momentum encoder at the last step."""
    negatives: Literal["auto", "local", "global", "ring"] = "auto"
    """Whose images a loss compares or averages over: this rank's or all ranks'. auto: global for plain SSL,
    local under GeSSL. ring: all ranks', passed around one rank's after the other, for keys that do not fit
    together (SimCLR, MoCo v3, CISSL)."""
    barlow: BarlowConfig = BarlowConfig()
    """Barlow Twins."""
    moco: MocoConfig = MocoConfig()
    """MoCo v2 and v2+."""
    swav: SwavConfig = SwavConfig()
    """SwAV."""
    dino: DinoConfig = DinoConfig()
    """DINO."""
    dissl: DisslConfig = DisslConfig()
    """DISSL."""


class GesslConfig(Section):
    """The bi-level objective. w_sigma = 0 is plain self-supervised learning, in the same code path."""

    inner_steps: Natural = 0
    """K: SGD steps on the task from the present weights to the student."""
    target_steps: Positive = 1
    """lambda: further SGD steps from the student to the self-motivated target."""
    inner_lr: PositiveFloat = 0.01
    """alpha: learning rate of the inner steps; inner_lr_schedule says what it is multiplied by."""
    inner_lr_schedule: Literal["constant", "cosine", "times_lr"] = "constant"
    """alpha over the run: constant; cosine: half a cosine from inner_lr towards 0; times_lr: inner_lr times
    the outer learning rate of the step, its warm-up included."""
    inner_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of the inner SGD, from rest at the present weights; the target goes on with the student's
    velocity."""
    hypergradient: Literal["exact", "first_order", "finite_difference"] = "exact"
    """How the outer gradient passes through the inner steps: exact (second order), first_order (identity
    Jacobian), finite_difference (central-difference Hessian-vector products: near exact where activations are
    smooth, as GELU is, not with ReLU)."""
    checkpoint_inner_steps: bool = True
    """exact, K > 1: keep the graph of one inner step at a time and make the others anew. Memory then does not
    grow with K."""
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
    def _something_to_descend(self) -> "GesslConfig":
        if self.w_ssl == 0 and self.w_sigma == 0:
            raise ValueError(
                "w_ssl and w_sigma are both 0, so there is nothing to train. Set one of them above 0."
            )
        return self


class DsaConfig(Section):
    """The Dynamic Semantic Adjuster: a regulator over a method with two views. weight 0 leaves it out."""

    weight: NonNegativeFloat = 0.0
    """lambda_1: weight of the term that draws alike images together and others apart."""
    prior_weight: NonNegativeFloat = 0.01
    """lambda_2: weight of the distance between what the discriminator and the helper network believe."""
    temperature: PositiveFloat = 0.5
    """T: distances are divided by it."""
    prior_temperature: PositiveFloat = 0.5
    """tau: distance of the helper network's features at which two images are alike with 1/e."""
    neighbours: Positive = 20
    """Nearest images of an image, among which the share of good ones is its weight."""
    good_paths: Natural = 1
    """mu: a neighbour is good if more than this many of its own neighbours have the image among theirs."""
    discriminator_hidden: Positive = 128
    """Hidden width of the network that looks at the difference of two projections."""
    helper: str = "momentum"
    """Network that says which images are alike: momentum (a slow copy of the encoder), or one of timm's by
    name."""
    helper_weights: str = "pretrained"
    """Weights of a timm helper: none, pretrained, a .safetensors file or a run's folder, whose stem and width
    come with them. Weights trained with labels are warned of."""
    helper_momentum: Fraction = 0.99
    """Momentum of the slow copy."""


class OptimConfig(Section):
    """The outer optimiser."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """Optimiser: sgd (with momentum), lars, adamw."""
    base_lr: PositiveFloat = 0.03
    """Learning rate for a batch of 256 images; the rate used is printed at the start."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """linear: lr = base_lr * batch_size / 256; none: lr = base_lr."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd and lars; first-moment decay of adamw."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; never applied to biases and normalisation layers."""
    trust_coefficient: PositiveFloat = 0.001
    """eta of lars."""
    trust_clip: bool = False
    """Clip lars' trust ratio so that it never exceeds the plain learning rate (LARC)."""
    clip_gradient: NonNegativeFloat = 0.0
    """Largest norm of all gradients together; 0 does not clip."""
    clip_gradient_each: NonNegativeFloat = 0.0
    """Largest gradient norm of each parameter by itself, as DINO clips; 0 does not clip."""


class ScheduleConfig(Section):
    """The outer learning rate over time."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Length of the linear warm-up from 0, epochs."""
    end_lr: Fraction = 0.0
    """Learning rate at the last step, as a share of the highest."""
    end_weight_decay: NonNegativeFloat = 1.0
    """Weight decay towards the last step, as a multiple of the first; half a cosine leads there (DINO)."""


class TrainConfig(Section):
    """The training loop and the run's folder."""

    batch_size: Natural = 256
    """Images of one optimiser step over all processes and all accumulated micro-batches; 0 is chosen from the
    number of images."""
    accumulate: Positive = 1
    """Micro-batches of an optimiser step; each is a task of its own."""
    epochs: Natural = 100
    """Passes over the training images; 0 is chosen from their number."""
    max_steps: Positive | None = None
    """Stop after this many optimiser steps; the schedules then end there too."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, order and views."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the encoder; auto takes bf16 on a GPU, fp16 on one that only emulates bf16 (before
    Ampere), and fp32 on a CPU."""
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
    """never, auto (newest checkpoint in run_dir), if_any (the same, or from the start if there is none: for
    schedulers that requeue and launchers that restart), or a checkpoint's folder."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10_080)] = 30.0
    """Minutes that a rank waits for the others in one collective, at the start too, before it gives up. More
    than rank 0 needs for a checkpoint and for its part of an evaluation during training."""
    nonfinite_limit: Positive = 10
    """Stop after this many optimiser steps in a row whose loss or gradient is not finite; each is skipped and
    counted."""
    gradient_cache: Natural = 0
    """Images a chunk and rank of an exact large-batch step: embeddings first, then the loss over all, then
    gradients chunk by chunk; 0 takes the whole batch at once. Plain methods only."""
    sharding: Literal["none", "fsdp"] = "none"
    """none: every rank holds all weights (DDP); fsdp: weights, gradients and optimiser state in parts over
    the ranks (FSDP2)."""


class EvaluateConfig(Section):
    """What is measured with the frozen encoder. Empty tasks: the quick ones that the data allows."""

    tasks: tuple[str, ...] = ()
    """Tasks: linear, few_labels, knn, sigma (these need labels), geometry; further, by name or `all`:
    linear_sgd, mlp, knn_protocols, label_fractions, few_shot, conditions, finetune, universality,
    learning."""
    transfer: tuple[str, ...] = ()
    """Further data sets for linear, knn, few_shot and universality: NAME=ROOT (cifar100=/data), a folder of
    images, or an .npz."""
    every_epochs: Natural = 0
    """Epochs between k-NN, online-probe and effective-rank reports during training; 0 evaluates at the end
    only."""
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
    probe_epochs: Positive = 30
    """Passes of the linear_sgd and mlp probes over the cached features."""
    mlp_hidden: Positive = 256
    """Hidden width of the mlp probe."""
    label_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.01, 0.1)
    """Shares of the training labels that the label_fractions probe and fine-tuning see."""
    fraction_draws: Positive = 3
    """Random draws of each share that the frozen label_fractions probe averages over."""
    shots: tuple[Positive, ...] = (1, 5)
    """Labelled images a class in a few-shot episode; each is measured."""
    ways: Annotated[int, Field(ge=2)] = 5
    """Classes in a few-shot episode."""
    queries: Positive = 15
    """Images a class that a few-shot episode classifies."""
    episodes: Annotated[int, Field(ge=2)] = 600
    """Few-shot episodes."""
    finetune_epochs: Positive = 30
    """Passes over the labelled images when the encoder itself is fine-tuned."""
    finetune_lrs: tuple[PositiveFloat, ...] = (1e-3, 3e-4)
    """Learning rates (AdamW) of which fine-tuning takes the one that is best on its validation split."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Fine-tuning: a layer's learning rate is that of the layer above it times this; 1 is one rate for all.
    """
    sigma_against: Literal["labels", "supervised"] = "labels"
    """universality: the target distribution of each task: one-hot labels, or a supervised model that is
    trained for it and kept."""
    supervised_epochs: Positive = 30
    """Passes over a task's training images when its supervised model is trained."""
    learning_tasks: Positive = 4
    """learning: held-out mini-batches, each a task."""
    learning_checkpoints: Positive = 6
    """learning: how many of the run's kept checkpoints are measured, the first and the last among them."""
    converged_steps: Positive = 50
    """learning: most SGD steps to the converged task-specific copy."""
    weights: str = "pretrained"
    """Weights of a timm:NAME: pretrained (timm's, fetched once), none (random), or a .safetensors file."""
    cache: bool = True
    """`fastgessl evaluate`: keep extracted features in the run's folder and use them again."""
    out: Path | None = None
    """Folder for the results on a model that is no run; runs/evaluate-<name> if not given."""


class LogConfig(Section):
    """What is written down during training."""

    every: Natural = 0
    """Optimiser steps between two lines of metrics.jsonl; 0 writes every step of a run of up to 100,000
    steps, and of a longer one as many, evenly spaced."""
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
    dsa: DsaConfig = DsaConfig()
    """The regulator."""
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

    def options(self) -> dict[str, Any]:
        """Every option by its dotted name, with its value as config.yaml has it.

        >>> options = Config().options()
        >>> options["recipe"], options["train.seed"], options["method.swav.prototypes"]
        ('custom', 0, 3000)
        """
        return flat(self.model_dump(mode="json"))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys.

    >>> flat({"recipe": "mine", "method": {"name": "moco", "moco": {"symmetric": False}}})
    {'recipe': 'mine', 'method.name': 'moco', 'method.moco.symmetric': False}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
