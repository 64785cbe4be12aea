"""Images, and views drawn of them, at random: what the tests of every implementation of views look at."""

import numpy as np
import torch

from fastgessl.kernels.views.parameters import ViewParameters

MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)


def images_of(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise, with a quarter of the rows grey and saturated patches, where hue and clipping are at their most
    delicate.
    """
    images = torch.randint(
        0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    images[: count // 4] = images[: count // 4, :, :, :1]
    images[:, : height // 3, : width // 3, 0] = 255
    return images


def random_parameters(count: int, height: int, width: int, seed: int = 0) -> ViewParameters:
    draw = np.random.default_rng(seed)
    tall, wide = draw.integers(1, height + 1, count), draw.integers(1, width + 1, count)
    crop = np.stack([draw.integers(0, height - tall + 1), draw.integers(0, width - wide + 1), tall, wide], 1)
    sigma = np.where(draw.random(count) < 0.5, draw.uniform(0.1, 2.0, count), 0)
    return ViewParameters(
        crop=torch.from_numpy(crop.astype(np.float32)),
        reach=torch.from_numpy(crop.astype(np.float32)),
        flip=torch.from_numpy(draw.random(count) < 0.5),
        jitter=torch.from_numpy(draw.random(count) < 0.8),
        factors=torch.from_numpy(
            draw.uniform([0.2, 0.0, 0.0, -0.5], [1.8, 1.8, 3.0, 0.5], (count, 4)).astype(np.float32)
        ),
        order=torch.from_numpy(np.argsort(draw.random((count, 4)), axis=1)),
        grayscale=torch.from_numpy(draw.random(count) < 0.2),
        blur_sigma=torch.from_numpy(sigma.astype(np.float32)),
        solarize=torch.from_numpy(draw.random(count) < 0.3),
    )
