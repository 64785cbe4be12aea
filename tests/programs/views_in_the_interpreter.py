"""Run the view kernels in Triton's interpreter and print, as JSON, their largest difference to batched
PyTorch, grey levels of 255.

A program of its own because TRITON_INTERPRET must be set before the kernels are defined. Input: a list of
cases on stdin.
"""

import json
import sys

import torch
from drawn_views import MEAN, STD, images_of, random_parameters

from fastgessl.kernels.views import triton as views_triton
from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.kernels.views.torch import augment_views, color_views


def operands(case):
    count, height, width = case["count"], case["height"], case["width"]
    images, drawn = images_of(count, height, width), random_parameters(count, height, width, case["size"])
    every = torch.arange(count)
    drawn = ViewParameters(
        **vars(drawn)
        | {
            "jitter": every % 4 != 3,
            "grayscale": every % 5 == 4,
            "blur_sigma": every % 2 * torch.linspace(0.1, 2, count) * case["blur"],
            "solarize": every % 3 == 1,
        }
    )
    # A crop finer than a pixel, of which interpolation may read beyond.
    drawn.crop[2] = torch.tensor([1.25, 0.5, height - 2.5, width - 1.75])
    drawn.reach[2] = torch.tensor([0.0, 0.0, height, width])
    # Factors that change nothing are left out on both sides.
    drawn.factors[0] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    return images, drawn


def difference(case):
    views_triton.WHOLE_PIXELS, views_triton.BLOCK_PIXELS = case["whole"], case["block"]
    images, drawn = operands(case)
    options = {"mean": MEAN, "std": STD, "blur_kernel": case["kernel"], "solarize_threshold": 100.0}
    if case["interpolation"] == "none":
        found, expected = (
            color_views(images, drawn, **options, implementation=name) for name in ("triton", "chunked")
        )
    else:
        options |= {"size": case["size"], "interpolation": case["interpolation"]}
        found, expected = (
            augment_views(images, drawn, **options, implementation=name) for name in ("triton", "chunked")
        )
    assert (
        found.is_contiguous(memory_format=torch.channels_last)
        and found.dtype == torch.float32
        and found.shape == expected.shape
    )
    return ((found - expected).abs() * torch.tensor(STD)[:, None, None] * 255).max().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([difference(case) for case in json.load(sys.stdin)]))
