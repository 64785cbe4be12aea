"""Linear and MLP probes by gradient descent on cached features: every learning rate in one pass, the best on
a validation split wins.

All learning rates see the same batches, and their weights are stacked in one tensor, so that eight cost
little more than one large product. This is the protocol of published "linear evaluation" numbers;
`linear.py` has the exact optimum of the same model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.evaluate.features import Features, RowFeatures
from fastgessl.evaluate.sources import hold_out, require_labels
from fastgessl.evaluate.tables import percent
from fastgessl.evaluate.tasks.base import EvaluationTask, register
from fastgessl.evaluate.tasks.linear import VALIDATION_FRACTION, Probe, standardization

# Standardized features: beyond 0.3 the steps of a 512-wide probe diverge, below 1e-3 thirty epochs leave it
# unfinished.
LEARNING_RATES = (0.3, 0.1, 0.05, 0.03, 0.01, 0.005, 0.003, 0.001)
MLP_LEARNING_RATES = (0.1, 0.03, 0.01, 0.003)
# Without classes large enough to validate on.
DEFAULT_LEARNING_RATE = 0.01
# Large batches cost least, but a small set needs its steps: at least 16 per epoch as long as a batch has 16
# images.
LARGEST_BATCH, SMALLEST_BATCH, STEPS_PER_EPOCH = 256, 16, 16
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class SgdProtocol:
    """How a probe is trained: SGD with Nesterov momentum and a cosine learning rate, on standardized
    features, in batches of `batch_size`.
    """

    hidden: int = 0
    """Width of the hidden layer; 0 for a linear probe."""
    epochs: int = 30
    seed: int = 0
    rates: tuple[float, ...] = ()
    """Learning rates of which the best is taken; empty for this module's."""
    device: torch.device | str = "cpu"

    @property
    def task(self) -> str:
        """The task whose protocol this is."""
        return "mlp" if self.hidden else "linear_sgd"


def gradient_probe(train: Features, test: Features, protocol: SgdProtocol) -> dict[str, Any]:
    """Fit as `fit_gradient_probe` does and read the test labels once: accuracy, with the learning_rate, the
    validation that chose it, epochs, and the hidden width (0 for a linear probe).

    >>> features = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> gradient_probe(features, features, SgdProtocol(epochs=20))["accuracy"]
    1.0
    """
    require_labels(protocol.task, train.labels, test.labels)
    test.require_finite("test images")
    probe = fit_gradient_probe(train, protocol)
    return {
        "accuracy": probe.accuracy(test),
        **probe.chosen,
        "epochs": protocol.epochs,
        "hidden": protocol.hidden,
    }


def fit_gradient_probe(train: Features, protocol: SgdProtocol) -> Probe:
    """A probe at the best of the protocol's learning rates.

    All of them are trained on four fifths of the training images in one pass; the one of the highest accuracy
    on the rest (the smaller of equals) is trained again on all of them. Raises UsageError as `linear_probe`
    does.
    """
    labels, _ = require_labels(protocol.task, train.labels, train.labels)
    train.require_finite("training images")
    rates = protocol.rates or (MLP_LEARNING_RATES if protocol.hidden else LEARNING_RATES)
    mean, scale = standardization(train.features)
    inputs = (train.features - mean) / scale
    classes, columns = labels.unique(return_inverse=True)
    rate, validation = rates[0], {}
    if len(rates) > 1:
        fitted, held = hold_out(labels, VALIDATION_FRACTION, torch.Generator().manual_seed(protocol.seed))
        rate = DEFAULT_LEARNING_RATE
        if len(held):
            predicted = _logits(inputs[held], descend(inputs[fitted], columns[fitted], rates, protocol))
            accuracies = (predicted.argmax(dim=2) == columns[held]).double().mean(dim=1).tolist()
            validation = dict(zip(rates, accuracies, strict=True))
            rate = min(rates, key=lambda rate: (-validation[rate], rate))
    layers = tuple((weight[0].T, bias[0, 0]) for weight, bias in descend(inputs, columns, (rate,), protocol))
    return Probe(mean, scale, classes, layers, {"learning_rate": rate, "validation": validation})


Layers = list[tuple[Tensor, Tensor]]
"""(weight (L, inputs, outputs), bias (L, 1, outputs)) of each layer, L learning rates side by side."""


def descend(inputs: Tensor, columns: Tensor, rates: tuple[float, ...], protocol: SgdProtocol) -> Layers:
    """The layers for each learning rate, all from the same start and on the same batches of inputs (N, F)
    with their classes (N,).
    """
    device = protocol.device
    generator = torch.Generator().manual_seed(protocol.seed)
    size = batch_size(len(inputs))
    steps = max(1, len(inputs) // size)
    start = _initial(inputs.shape[1], protocol.hidden, int(columns.max()) + 1, len(rates), generator)
    layers = [
        (weight.to(device).requires_grad_(), bias.to(device).requires_grad_()) for weight, bias in start
    ]
    # A learning rate is a factor of the loss: SGD with momentum is linear in the gradient. So that one
    # optimizer at rate 1 trains all rates at once.
    factors = torch.tensor(rates, device=device)
    optimizer = torch.optim.SGD(
        [p for layer in layers for p in layer], lr=1, momentum=MOMENTUM, nesterov=True
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs * steps)
    for _ in range(protocol.epochs):
        # The last rows of the order are left out where they would be less than a batch.
        order = torch.randperm(len(inputs), generator=generator)[: steps * size]
        for rows in order.split(size):
            logits = _logits(inputs[rows].to(device), layers)
            losses = F.cross_entropy(
                logits.flatten(0, 1), columns[rows].to(device).repeat(len(rates)), reduction="none"
            )
            decay = sum(weight.square().sum(dim=(1, 2)) for weight, _ in layers) * WEIGHT_DECAY / 2
            optimizer.zero_grad()
            (factors * (losses.view(len(rates), -1).mean(dim=1) + decay)).sum().backward()
            optimizer.step()
            cosine.step()
    return [(weight.detach().cpu(), bias.detach().cpu()) for weight, bias in layers]


def batch_size(count: int) -> int:
    """Images per step of a probe on `count` images.

    >>> batch_size(50_000), batch_size(1198), batch_size(100)
    (256, 74, 16)
    """
    return max(SMALLEST_BATCH, min(LARGEST_BATCH, count // STEPS_PER_EPOCH))


def _initial(width: int, hidden: int, classes: int, rates: int, generator: torch.Generator) -> Layers:
    """Zeros for the last layer (a linear probe is convex), He's normal for a hidden one, the same for every
    learning rate.
    """
    bias = torch.zeros(rates, 1, classes)
    if not hidden:
        return [(torch.zeros(rates, width, classes), bias)]
    first = torch.randn(width, hidden, generator=generator) * (2 / width) ** 0.5
    # A hidden layer under a zero one would get no gradient at first; a small one breaks the tie between its
    # units.
    last = torch.randn(hidden, classes, generator=generator) * 0.01
    return [
        (first.repeat(rates, 1, 1), torch.zeros(rates, 1, hidden)),
        (last.repeat(rates, 1, 1), bias),
    ]


def _logits(inputs: Tensor, layers: Layers) -> Tensor:
    """(N, F) -> (L, N, C)."""
    # One product for all rates, which share the inputs.
    outputs = torch.einsum("nf,lfh->lnh", inputs, layers[0][0]) + layers[0][1]
    for weight, bias in layers[1:]:
        outputs = torch.baddbmm(bias, outputs.relu(), weight)
    return outputs


def _measure(features: RowFeatures, hidden: int, epochs: int, seed: int) -> dict[str, Any]:
    protocol = SgdProtocol(hidden, epochs, seed, device=features.device)
    return gradient_probe(features.train, features.test, protocol)


register(
    EvaluationTask(
        "linear_sgd",
        lambda features, settings, seed: _measure(features, 0, settings.probe_epochs, seed),
        columns=lambda settings: [percent("linear\nSGD")],
        place=(1, 0),
        transfer=True,
    )
)
register(
    EvaluationTask(
        "mlp",
        lambda features, settings, seed: _measure(features, settings.mlp_hidden, settings.probe_epochs, seed),
        columns=lambda settings: [percent(f"MLP\n{settings.mlp_hidden}")],
        place=(1, 1),
        transfer=True,
    )
)
