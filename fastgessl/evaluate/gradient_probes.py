"""Linear and MLP probes by gradient descent on cached features: every learning rate in one pass, the best on
a validation split wins.

All learning rates see the same batches, and their weights lie side by side in one matrix, so that eight cost
little more than one large product. This is the protocol of published "linear evaluation" numbers; `linear.py`
has the exact optimum of the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.evaluate.features import Features
from fastgessl.evaluate.linear import VALIDATION_FRACTION, standardisation
from fastgessl.evaluate.progress import shown
from fastgessl.evaluate.splits import hold_out, require_labels

# Standardised features: beyond 0.3 the steps of a 512-wide probe diverge, below 1e-3 thirty epochs leave it
# unfinished.
LEARNING_RATES = (0.3, 0.1, 0.05, 0.03, 0.01, 0.005, 0.003, 0.001)
MLP_LEARNING_RATES = (0.1, 0.03, 0.01, 0.003)
# Without classes large enough to validate on.
DEFAULT_LEARNING_RATE = 0.01
# Large batches cost least, but a small set needs its steps: at least 16 an epoch as long as a batch has 16
# images.
LARGEST_BATCH, SMALLEST_BATCH, STEPS_AN_EPOCH = 256, 16, 16
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class GradientProbe:
    """A fitted probe: features (N, F) -> log-probabilities (N, C), through a hidden layer if it has one."""

    mean: Tensor
    """(F,) float32, of the training features."""
    scale: Tensor
    """(F,) float32."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """(weight (inputs, outputs), bias (outputs,)) of each layer, ReLU between them."""
    classes: Tensor
    """(C,) int64, the label that each output stands for, increasing."""
    learning_rate: float
    """As chosen."""
    validation: dict[float, float]
    """Learning rate -> accuracy on the held-out fifth of the training images; empty where no class could give
    one away."""

    def log_probabilities(self, features: Tensor) -> Tensor:
        """(N, F) float32 -> (N, C) float64."""
        hidden = (features - self.mean) / self.scale
        for weight, bias in self.layers[:-1]:
            hidden = F.relu(hidden @ weight + bias)
        weight, bias = self.layers[-1]
        return F.log_softmax((hidden @ weight + bias).double(), dim=1)

    def columns(self, labels: Tensor) -> Tensor:
        """Labels (N,) -> the output that stands for each, (N,)."""
        return torch.searchsorted(self.classes, labels)


@dataclass(frozen=True)
class GradientProbeResult:
    """What a probe by gradient descent reaches on the test images."""

    accuracy: float
    learning_rate: float
    validation: dict[float, float]
    epochs: int
    hidden: int
    """Width of the hidden layer; 0 for a linear probe."""


def gradient_probe(
    train: Features,
    test: Features,
    *,
    hidden: int = 0,
    epochs: int = 30,
    seed: int = 0,
    progress: bool = False,
) -> GradientProbeResult:
    """Fit as `fit_gradient_probe` does and read the test labels once.

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> gradient_probe(features, features, epochs=20).accuracy
    1.0
    """
    _, labels = require_labels("mlp" if hidden else "linear_sgd", train.labels, test.labels)
    test.require_finite("test images")
    probe = fit_gradient_probe(train, hidden=hidden, epochs=epochs, seed=seed, progress=progress)
    return GradientProbeResult(
        accuracy_of(probe, test.features, labels), probe.learning_rate, probe.validation, epochs, hidden
    )


def fit_gradient_probe(
    train: Features,
    *,
    hidden: int = 0,
    epochs: int = 30,
    seed: int = 0,
    rates: tuple[float, ...] = (),
    progress: bool = False,
) -> GradientProbe:
    """SGD with Nesterov momentum, a cosine learning rate and batches of `batch_size`, on standardised
    features; `hidden` 0 is a linear probe.

    All `rates` (the module's, if none are given) are trained on four fifths of the training images in one
    pass, the one of the highest accuracy on the rest (the smaller of equals) is trained again on all of them.
    Raises UsageError as `linear_probe` does.
    """
    labels, _ = require_labels("mlp" if hidden else "linear_sgd", train.labels, train.labels)
    train.require_finite("training images")
    rates = tuple(sorted(rates or (MLP_LEARNING_RATES if hidden else LEARNING_RATES), reverse=True))
    mean, scale = standardisation(train.features)
    inputs = (train.features - mean) / scale
    classes, columns = labels.unique(return_inverse=True)
    chosen, validation = rates[0], {}
    if len(rates) > 1:
        fitted, held = hold_out(labels, VALIDATION_FRACTION, torch.Generator().manual_seed(seed))
        chosen = DEFAULT_LEARNING_RATE
        if len(held):
            layers = _descend(
                inputs[fitted], columns[fitted], rates, len(classes), hidden, epochs, seed, progress
            )
            predicted = _logits(inputs[held], layers, len(rates)).argmax(dim=2)
            accuracies = (predicted == columns[held, None]).double().mean(dim=0).tolist()
            validation = dict(zip(rates, accuracies, strict=True))
            chosen = min(rates, key=lambda rate: (-validation[rate], rate))
    layers = _descend(inputs, columns, (chosen,), len(classes), hidden, epochs, seed, progress)
    return GradientProbe(
        mean, scale, tuple((weight[0], bias[0, 0]) for weight, bias in layers), classes, chosen, validation
    )


def accuracy_of(probe: GradientProbe, features: Tensor, labels: Tensor) -> float:
    """Share of (N, F) features whose most probable class is their label (N,)."""
    predicted = probe.classes[probe.log_probabilities(features).argmax(dim=1)]
    return (predicted == labels).double().mean().item()


Layers = list[tuple[Tensor, Tensor]]
"""(weight (L, inputs, outputs), bias (L, 1, outputs)) of each layer, L learning rates side by side."""


def _descend(
    inputs: Tensor,
    columns: Tensor,
    rates: tuple[float, ...],
    classes: int,
    hidden: int,
    epochs: int,
    seed: int,
    progress: bool,
) -> Layers:
    """The layers after `epochs` of SGD for each learning rate, all from the same start and on the same
    batches of (N, F) inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _initial(inputs.shape[1], hidden, classes, len(rates), generator)
    velocities = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in layers]
    scale = torch.tensor(rates).view(-1, 1, 1)
    size = batch_size(len(inputs))
    batches = max(1, len(inputs) // size)
    cosine = (1 + torch.cos(torch.pi * torch.arange(epochs * batches) / (epochs * batches))) / 2
    order = (
        batch
        for _ in shown(range(epochs), "probe", progress)
        for batch in _epoch(len(inputs), size, generator)
    )
    for step, rows in enumerate(order):
        gradients = _gradients(inputs[rows], columns[rows], layers)
        for (weight, bias), (moving, shifting), (slope, offset) in zip(
            layers, velocities, gradients, strict=True
        ):
            _step(weight, moving, slope.add_(weight, alpha=WEIGHT_DECAY), cosine[step] * scale)
            _step(bias, shifting, offset, cosine[step] * scale)
    return layers


def batch_size(count: int) -> int:
    """Images a step of a probe on `count` images.

    >>> batch_size(50_000), batch_size(1198), batch_size(100)
    (256, 74, 16)
    """
    return max(SMALLEST_BATCH, min(LARGEST_BATCH, count // STEPS_AN_EPOCH))


def _epoch(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of each batch; the last rows of the new order are left out where they would be less than a
    batch.
    """
    order = torch.randperm(count, generator=generator)
    return iter(order[: max(1, count // size) * size].split(size))


def _initial(width: int, hidden: int, classes: int, rates: int, generator: torch.Generator) -> Layers:
    """Zeros for the last layer (a linear probe is convex), He's normal for a hidden one, the same for every
    learning rate.
    """
    output = (torch.zeros(rates, hidden or width, classes), torch.zeros(rates, 1, classes))
    if not hidden:
        return [output]
    weight = torch.randn(width, hidden, generator=generator) * (2 / width) ** 0.5
    # A hidden layer under a zero one would get no gradient at first; a small one breaks the tie between its
    # units.
    output[0].copy_(torch.randn(hidden, classes, generator=generator) * 0.01)
    return [(weight.expand(rates, -1, -1).clone(), torch.zeros(rates, 1, hidden)), output]


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    """(B, F) or (L, B, F) times (L, F, H) -> (L, B, H); shared inputs take one product instead of L."""
    if inputs.ndim == 3:
        return torch.bmm(inputs, weight)
    count, width, outputs = weight.shape
    return (
        (inputs @ weight.transpose(0, 1).reshape(width, count * outputs))
        .view(-1, count, outputs)
        .transpose(0, 1)
    )


def _transposed_product(inputs: Tensor, slopes: Tensor) -> Tensor:
    """(B, F) or (L, B, F), and (L, B, H) -> Σ over B, (L, F, H)."""
    if inputs.ndim == 3:
        return torch.bmm(inputs.transpose(1, 2), slopes)
    count, rows, outputs = slopes.shape
    flat = inputs.T @ slopes.transpose(0, 1).reshape(rows, count * outputs)
    return flat.view(-1, count, outputs).transpose(0, 1).contiguous()


def _logits(inputs: Tensor, layers: Layers, rates: int) -> Tensor:
    """(N, F) -> (N, L, C)."""
    hidden = inputs
    for weight, bias in layers[:-1]:
        hidden = F.relu(_product(hidden, weight) + bias)
    return (_product(hidden, layers[-1][0]) + layers[-1][1]).transpose(0, 1)


def _gradients(inputs: Tensor, columns: Tensor, layers: Layers) -> Layers:
    """∇ of the mean cross-entropy of each learning rate's probe, in the form of `layers`; written out, it
    takes half of autograd's time.
    """
    activations = [inputs]
    for weight, bias in layers[:-1]:
        activations.append(F.relu(_product(activations[-1], weight) + bias))
    slopes = (_product(activations[-1], layers[-1][0]) + layers[-1][1]).softmax(dim=2)
    slopes[:, torch.arange(len(inputs)), columns] -= 1
    slopes = slopes / len(inputs)
    gradients = []
    for number in reversed(range(len(layers))):
        gradients.append((_transposed_product(activations[number], slopes), slopes.sum(dim=1, keepdim=True)))
        if number:
            slopes = torch.bmm(slopes, layers[number][0].transpose(1, 2)) * (activations[number] > 0)
    return gradients[::-1]


def _step(value: Tensor, velocity: Tensor, slope: Tensor, rate: Tensor) -> None:
    """Nesterov's momentum as torch.optim.SGD has it, with a learning rate for each of the L probes."""
    velocity.mul_(MOMENTUM).add_(slope)
    value.sub_(rate * (slope + MOMENTUM * velocity))
