"""Run the view kernels in Triton's interpreter and print, as JSON, their largest difference to batched
PyTorch, grey levels of 255.

A program of its own because TRITON_INTERPRET must be set before the kernels are defined. Input: a list of
cases on stdin.
"""

import json
import sys

import numpy as np
import torch

from fastgessl.kernels.views import triton as views_triton
from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.kernels.views.torch import augment_views, color_views

MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)


def operands(case):
    draw = np.random.default_rng(case["size"])
    count, height, width = case["count"], case["height"], case["width"]
    images = torch.from_numpy(draw.integers(0, 256, (count, height, width, 3), dtype=np.uint8))
    images[0] = images[0, :, :, :1]
    images[1, :, :, 0] = 255
    tall, wide = draw.integers(1, height + 1, count), draw.integers(1, width + 1, count)
    crop = np.stack(
        [draw.integers(0, height - tall + 1), draw.integers(0, width - wide + 1), tall, wide], 1
    ).astype(np.float32)
    reach = crop.copy()
    # A crop finer than a pixel, of which interpolation may read beyond.
    crop[2], reach[2] = (1.25, 0.5, height - 2.5, width - 1.75), (0, 0, height, width)
    drawn = ViewParameters(
        crop=torch.from_numpy(crop),
        reach=torch.from_numpy(reach),
        flip=torch.from_numpy(draw.random(count) < 0.5),
        jitter=torch.from_numpy(np.arange(count) % 4 != 3),
        factors=torch.from_numpy(
            draw.uniform([0.2, 0.2, 0.2, -0.5], [1.8, 1.8, 1.8, 0.5], (count, 4)).astype(np.float32)
        ),
        order=torch.from_numpy(np.argsort(draw.random((count, 4)), axis=1)),
        grayscale=torch.from_numpy(np.arange(count) % 5 == 4),
        blur_sigma=torch.from_numpy(
            np.where(np.arange(count) % 2, draw.uniform(0.1, 2, count), 0).astype(np.float32)
        ),
        solarize=torch.from_numpy(np.arange(count) % 3 == 1),
    )
    # Factors that change nothing are left out on both sides.
    drawn.factors[0] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    if not case["blur"]:
        drawn.blur_sigma.zero_()
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
