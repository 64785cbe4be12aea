"""Narrow, smooth float64 encoders on which an outer gradient can be checked against central differences, and
a literal objective.
"""

import copy
from functools import cached_property

import torch
from torch import nn
from torch.func import functional_call
from toys import logits, method_config

from fastgessl.config import GesslConfig
from fastgessl.methods import RunFacts, build_method
from fastgessl.models import BottleneckHead


def toy_backbone(dropout=0.0):
    """Two convolutions with batch norm, tanh and average pooling: (B, 3, 6, 6) -> (B, 6)."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Dropout(dropout),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    backbone.num_features = 6
    return backbone


# What a method needs besides narrow heads.
OPTIONS = {
    "barlow": {"loss_scale": 0.5},
    "dino": {
        "prototypes": 12,
        "temperature": 0.3,
        "teacher_temperature": 0.2,
        "teacher_temperature_start": 0.2,
    },
    "moco": {"queue_length": 16},
    "swav": {
        "prototypes": 12,
        "temperature": 0.3,
        "sinkhorn_epsilon": 0.3,
        "queue_length": 16,
        "queue_start_epoch": 0.0,
    },
    "dissl": {"prototypes": 12, "temperature": 0.3, "assignment_temperature": 0.15},
}


def toy_method(name, *, negatives="local", dropout=0.0, dtype=torch.float64, make_backbone=toy_backbone):
    """A registered method with narrow heads whose ReLUs are made smooth; the same weights at every call."""
    torch.manual_seed(1)
    options = {
        "projector_hidden": 10,
        "projector_out": 5,
        "predictor_hidden": 8,
        "momentum_start": 0.9,
    } | OPTIONS.get(name, {})
    facts = RunFacts(total_steps=10, negatives=negatives, classes=3)
    method = build_method(method_config(name, **options), make_backbone(dropout), facts)
    for module in list(method.modules()):
        if isinstance(module, BottleneckHead):
            # Its small first weights make outputs of norm 1e-4, on whose directions central differences see
            # little but curvature.
            for layer in (part for part in module if isinstance(part, nn.Linear)):
                layer.reset_parameters()
        for child_name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, child_name, nn.Softplus())
    # A momentum encoder that equals the online one would hide a mix-up of the two.
    with torch.no_grad():
        for parameter in method.parameters():
            if not parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method.to(dtype)


def toy_views(seed=0, images=8, dtype=torch.float64):
    """Two noisy copies of the same random images, (N, 3, 6, 6) each."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(images, 3, 6, 6, generator=generator, dtype=torch.float64)
    return [
        (clean + 0.3 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    ]


def toy_labels(seed=0, images=8):
    """Classes of the images of `toy_views`, of which only the supervised method learns."""
    return torch.randint(3, (images,), generator=torch.Generator().manual_seed(seed))


def trainable(method):
    return {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}


def gradients(method):
    """All gradients of the trainable parameters in one vector; a missing one is zero."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainable(method).values()]
    )


class LiteralObjective:
    """gessl.md's algorithm by the letter, dense and slow: every forward made anew, nothing shared, KL from
    two log-softmax tables.
    """

    def __init__(self, method, settings, views, query_views=None):
        self.method, self.settings = copy.deepcopy(method), settings
        self.views, self.query_views = views, query_views or views
        self.weights = {name: weight.detach().clone() for name, weight in trainable(method).items()}
        self.aux, self.query_aux = (copy.deepcopy(method).targets(v) for v in (self.views, self.query_views))
        self.aux = method.settle(self.outputs({}, self.views).detached(), self.aux)

    def outputs(self, weights, views):
        return functional_call(copy.deepcopy(self.method), weights, (views,))

    def loss(self, weights):
        return self.method.loss(self.outputs(weights, self.views), self.aux)

    def log_pi(self, weights):
        tables = self.method.similarity(self.outputs(weights, self.query_views), self.query_aux)
        return torch.stack([logits(pi).log_softmax(1) for pi in tables])

    def step(self, weights, velocity):
        names = [name for name in weights if self.settings.scope == "all" or "backbone." not in name]
        weights = {name: weight.detach().requires_grad_(name in names) for name, weight in weights.items()}
        slopes = torch.autograd.grad(self.loss(weights), [weights[name] for name in names])
        momentum = self.settings.inner_momentum
        velocity = {
            name: momentum * velocity.get(name, 0.0) + slope
            for name, slope in zip(names, slopes, strict=True)
        }
        stepped = {name: weights[name] - self.settings.inner_lr * v for name, v in velocity.items()}
        return {name: stepped.get(name, weight).detach() for name, weight in weights.items()}, velocity

    def after(self, steps, weights):
        velocity = {}
        for _ in range(steps):
            weights, velocity = self.step(weights, velocity)
        return weights

    def student(self, weights):
        return self.after(self.settings.inner_steps, weights)

    @cached_property
    def target(self):
        return self.after(self.settings.inner_steps + self.settings.target_steps, self.weights)

    @cached_property
    def log_target(self):
        return self.log_pi(self.target)

    def kl(self, log_student):
        return (self.log_target.exp() * (self.log_target - log_student)).sum(-1).mean()

    def sigma(self, offset):
        """σ at θ + offset, a vector, against the target of θ."""
        parts = offset.split([weight.numel() for weight in self.weights.values()])
        moved = {
            name: weight + part.view_as(weight)
            for (name, weight), part in zip(self.weights.items(), parts, strict=True)
        }
        return self.kl(self.log_pi(self.student(moved))).item()

    def slope(self, direction, radius=1e-5):
        """Central difference of σ along a vector of length 1."""
        return (self.sigma(radius * direction) - self.sigma(-radius * direction)) / (2 * radius)


def assert_slopes_agree(gradient, literal, directions=5):
    """The outer gradient against central differences along random directions."""
    for seed in range(directions):
        torch.manual_seed(seed)
        direction = torch.nn.functional.normalize(torch.randn_like(gradient), dim=0)
        expected = literal.slope(direction)
        # 1e-5 of this directional derivative, or of a typical one where the objective happens to be level.
        typical = gradient.norm() / len(gradient) ** 0.5
        assert abs(gradient @ direction - expected) <= 1e-5 * max(abs(expected), typical)


BI_LEVEL = {
    "exact": GesslConfig(inner_steps=2, target_steps=2, inner_lr=0.1, w_sigma=1.0),
    "fast": GesslConfig(inner_lr=0.1, w_sigma=1.0),
    "head": GesslConfig(inner_steps=1, inner_lr=0.1, scope="head", w_sigma=1.0),
    "first_order": GesslConfig(inner_steps=1, inner_lr=0.1, hypergradient="first_order", w_sigma=1.0),
    "finite_difference": GesslConfig(
        inner_steps=1, inner_lr=0.1, hypergradient="finite_difference", w_sigma=1.0
    ),
}
