"""The view kernels in Triton's interpreter, through the public functions, against batched PyTorch (which
equals torchvision).
"""

import pytest
import torch
from drawn_views import MEAN, STD, images_of, random_parameters
from interpreter import printed_by

from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.kernels.views.torch import augment_views

# `whole` and `block` make small pictures take the path of large ones, in several blocks of which the last is
# not full.
ENLARGED = {"height": 8, "width": 8, "size": 12, "kernel": 3, "count": 6}
REDUCED = {"height": 33, "width": 21, "size": 10, "kernel": 5, "count": 6}
CASES = {
    "enlarged, one block": ENLARGED,
    "enlarged, bicubic": ENLARGED | {"interpolation": "bicubic"},
    "reduced, one block": REDUCED,
    "reduced, several blocks": REDUCED | {"whole": 64, "block": 64},
    "reduced, bicubic, several blocks": REDUCED | {"interpolation": "bicubic", "whole": 64, "block": 64},
    "colour, one block": ENLARGED | {"height": 9, "width": 9, "size": 9, "interpolation": "none"},
    "colour, several blocks": ENLARGED
    | {"height": 9, "width": 9, "size": 9, "interpolation": "none", "whole": 64, "block": 64},
    "without blur": ENLARGED | {"blur": False},
}
for case in CASES.values():
    for name, value in {"interpolation": "bilinear", "whole": 4096, "block": 1024, "blur": True}.items():
        case.setdefault(name, value)


@pytest.fixture(scope="module")
def differences():
    return dict(zip(CASES, printed_by("views_in_the_interpreter.py", list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_views_equal_batched_pytorch(name, differences):
    print(f"{name}: {differences[name]:.1e} of 255")
    assert differences[name] < 2e-3


def test_a_cpu_takes_pytorch_and_a_wish_that_cannot_be_met_is_refused():
    pytest.importorskip("triton")
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    options = {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="the Triton kernels cannot be used"):
        augment_views(images, ViewParameters.unchanged(1, 8, 8), **options, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_on_a_gpu_views_equal_those_of_the_cpu(size, interpolation):
    images, drawn = images_of(64, 96, 80), random_parameters(64, 96, 80)
    options = {"size": size, "mean": MEAN, "std": STD, "interpolation": interpolation, "blur_kernel": 9}
    expected = augment_views(images, drawn, **options)
    found = augment_views(images.cuda(), drawn, **options, implementation="triton").cpu()
    assert ((found - expected).abs() * torch.tensor(STD)[:, None, None] * 255).max() < 0.02
