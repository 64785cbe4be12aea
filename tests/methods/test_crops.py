"""What multi-crop methods share."""

import pytest
import torch
from torch import nn
from toys import toy_method

from fastgessl.config import GesslConfig, UsageError
from fastgessl.kernels.prototypes import other_views
from fastgessl.methods import METHODS, RunFacts
from fastgessl.objective import GeSSL

OPTIONS = {
    "moco": {"queue_length": 20},
    "swav": {"prototypes": 9, "queue_length": 0},
    "dino": {"prototypes": 9},
    "dissl": {"prototypes": 9},
}
multi_crop = pytest.mark.parametrize(
    "name", sorted(name for name, method in METHODS.items() if method.multi_crop and not method.needs_labels)
)


def toy(name, **facts):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 6
    facts = RunFacts(total_steps=10, images_per_forward=5, **facts)
    return toy_method(name, facts, backbone, **OPTIONS.get(name, {}))


def crops(sizes, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(5, 3, size, size, dtype=torch.float64) for size in sizes]


def test_a_view_meets_all_views_but_itself():
    rows = torch.randn(5, 3, 2)
    pairs = other_views(rows, 2)
    assert [view for view, _ in pairs] == [1, 0]
    assert torch.equal(pairs[0][1], rows[[0, 2, 3, 4]]) and torch.equal(pairs[1][1], rows[1:])


@multi_crop
@pytest.mark.parametrize(
    "settings", [GesslConfig(), GesslConfig(inner_steps=1, inner_lr=0.1, w_sigma=1.0)], ids=["plain", "gessl"]
)
def test_smaller_views_reach_the_loss_and_its_gradient(name, settings):
    views = crops([4, 4, 2, 2, 2])
    slopes = []
    for changed in (None, 2, 4):
        method = toy(name, local_views=3)
        given = [view + 0.5 if index == changed else view for index, view in enumerate(views)]
        GeSSL(method, settings)(given).loss.backward()
        slopes.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    assert all((slope - slopes[0]).norm() > 1e-4 * slopes[0].norm() for slope in slopes[1:])


@multi_crop
def test_targets_come_from_the_views_of_full_size_alone(name):
    first, second = crops([4, 4, 2, 2]), crops([4, 4, 2, 2])
    second[2:] = crops([2, 2], seed=1)
    found = [toy(name, local_views=2).targets(views) for views in (first, second)]
    tensors = [[aux] if torch.is_tensor(aux) or aux is None else list(vars(aux).values()) for aux in found]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize(
    "name", sorted(name for name, method in METHODS.items() if not (method.multi_crop or method.needs_labels))
)
def test_smaller_views_in_a_method_without_use_for_them_are_refused(name):
    with pytest.raises(UsageError, match=f"method '{name}' has no use for smaller views"):
        toy(name, local_views=2)
