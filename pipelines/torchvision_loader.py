"""The torchvision engine: torchvision's own functions in a DataLoader's processes. The way out where DALI does not install.

It is shown the same draws as the other engines, so that it is also what they are compared with.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch
import torchvision.transforms.v2.functional as functional
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastgessl.kernels.views import ViewParameters
from fastgessl.pipelines.draws import Draws
from fastgessl.pipelines.engine import Request
from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.header import decode
from fastgessl.pipelines.images import ArrayImages, Images
from fastgessl.pipelines.specs import ViewSpec

_ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)


def torchvision_view(picture: Tensor, spec: ViewSpec, drawn: ViewParameters) -> Tensor:
    """One view of one picture: (3, H, W) uint8 and a draw of one row -> (3, S, S) float32. Colour in float, as torchvision has it there."""
    interpolation = functional.InterpolationMode(spec.interpolation)
    if spec.resize_short:
        picture = functional.resize(picture, [spec.resize_short], interpolation=interpolation)
        picture = functional.center_crop(picture, [spec.size])
    else:
        top, left, height, width = (int(value) for value in drawn.crop[0])
        picture = functional.resized_crop(picture, top, left, height, width, [spec.size, spec.size], interpolation=interpolation)
    view = functional.to_dtype(picture, torch.float32, scale=True)
    if drawn.flip[0]:
        view = functional.horizontal_flip(view)
    if drawn.jitter[0]:
        for operation in drawn.order[0].tolist():
            view = _ADJUST[operation](view, drawn.factors[0, operation].item())
    if drawn.grayscale[0]:
        view = functional.rgb_to_grayscale(view, num_output_channels=3)
    if drawn.blur_sigma[0] > 0:
        view = functional.gaussian_blur(view, [spec.blur_kernel, spec.blur_kernel], [drawn.blur_sigma[0].item()])
    if drawn.solarize[0]:
        view = functional.solarize(view, spec.solarize_threshold / 255)
    return functional.normalize(view, list(spec.mean), list(spec.std))


class _Views(Dataset[list[Tensor] | DataError]):
    """Answers whole requests: what a DataLoader's worker does for one batch.

    A mistake in the data is answered too: raised in a worker, it would reach the user wrapped in the worker's traceback.
    """

    def __init__(self, images: Images, draws: Draws) -> None:
        self._images, self._draws = images, draws

    def __getitem__(self, request: Request) -> list[Tensor] | DataError:
        try:
            pictures = [self._picture(int(image)) for image in request.index]
        except DataError as error:
            return error
        height, width = np.array([picture.shape[1:] for picture in pictures]).T
        drawn = self._draws(request.index, height, width, request.epoch)
        views = []
        for spec, parameters in zip(self._draws.specs, drawn, strict=True):
            made = [torchvision_view(picture, spec, parameters[row : row + 1]) for row, picture in enumerate(pictures)]
            views.append(torch.stack(made).contiguous(memory_format=torch.channels_last))
        return views

    def _picture(self, image: int) -> Tensor:
        if isinstance(self._images, ArrayImages):
            return torch.from_numpy(self._images.images[image]).permute(2, 0, 1)
        return torch.from_numpy(np.array(decode(self._images.paths[image]))).permute(2, 0, 1)


class TorchvisionEngine:
    """A DataLoader with `workers` processes, started for each epoch."""

    def __init__(self, images: Images, draws: Draws, device: torch.device, workers: int) -> None:
        self._views, self._device, self._workers = _Views(images, draws), device, workers

    def views(self, requests: Iterator[Request]) -> Generator[list[Tensor]]:
        on_gpu = self._device.type == "cuda"
        # batch_size=None: an item is a whole batch already.
        loader = DataLoader(self._views, batch_size=None, sampler=_InOrder(requests), num_workers=self._workers, pin_memory=on_gpu)
        for views in loader:
            if isinstance(views, DataError):
                raise views
            yield [view.to(self._device, non_blocking=on_gpu) for view in views]

    def close(self) -> None:
        """Nothing outlives an epoch."""


class _InOrder:
    """The requests as a DataLoader's sampler."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests


def make_engine(images: Images, draws: Draws, *, batch_size: int, device: torch.device, workers: int) -> TorchvisionEngine:
    """`batch_size` plays no part: a request says how many images it wants."""
    return TorchvisionEngine(images, draws, device, workers)
