"""The torchvision engine: torchvision's own functions in a DataLoader's processes. The way out where DALI
does not install.

It is shown the same draws as the other engines, so that it is also what they are compared with.
"""

import gc
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as functional
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.pipelines.decode import decode
from fastgessl.pipelines.engines import Engine, Made, Request, Setup
from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import ArrayImages
from fastgessl.pipelines.views import ViewSpec

_ADJUST = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def torchvision_view(picture: Tensor, spec: ViewSpec, drawn: ViewParameters) -> Tensor:
    """One view of one picture: (3, H, W) uint8 and a draw of one row -> (3, S, S) float32. Color in float,
    as torchvision has it there.
    """
    interpolation = functional.InterpolationMode(spec.interpolation)
    if spec.resize_short:
        picture = functional.resize(picture, [spec.resize_short], interpolation=interpolation)
        picture = functional.center_crop(picture, [spec.size])
    else:
        top, left, height, width = (int(value) for value in drawn.crop[0])
        picture = functional.resized_crop(
            picture, top, left, height, width, [spec.size, spec.size], interpolation=interpolation
        )
    view = functional.to_dtype(picture, torch.float32, scale=True)
    if drawn.flip[0]:
        view = functional.horizontal_flip(view)
    if drawn.jitter[0]:
        for operation in drawn.order[0].tolist():
            view = _ADJUST[operation](view, drawn.factors[0, operation].item())
    if drawn.grayscale[0]:
        view = functional.rgb_to_grayscale(view, num_output_channels=3)
    if drawn.blur_sigma[0] > 0:
        view = functional.gaussian_blur(
            view, [spec.blur_kernel, spec.blur_kernel], [drawn.blur_sigma[0].item()]
        )
    if drawn.solarize[0]:
        view = functional.solarize(view, spec.solarize_threshold / 255)
    return functional.normalize(view, list(spec.mean), list(spec.std))


class _Answer(NamedTuple):
    """What a DataLoader's worker made of a request."""

    made: Made
    bad: dict[int, str]


class _Worker(Dataset[_Answer | DataError]):
    """Answers whole requests: what a DataLoader's worker does for one batch.

    A mistake in the data is answered too: raised in a worker, it would reach the user wrapped in the worker's
    traceback.
    """

    def __init__(self, setup: Setup) -> None:
        self._images, self._draws, self._bad_files = setup.images, setup.draws, setup.bad_files

    def __getitem__(self, request: Request) -> _Answer | DataError:
        try:
            obtained = self._bad_files.obtain(request.index, self._picture)
        except DataError as error:
            return error
        views = []
        if pictures := obtained.contents:
            height, width = np.array([picture.shape[1:] for picture in pictures]).T
            drawn = self._draws(obtained.asked, height, width, request.epoch)
            for spec, rows in zip(self._draws.specs, drawn, strict=True):
                made = [
                    torchvision_view(picture, spec, rows[row : row + 1])
                    for row, picture in enumerate(pictures)
                ]
                views.append(torch.stack(made).contiguous(memory_format=torch.channels_last))
        return _Answer(Made(views, obtained.images), dict(self._bad_files.found))

    def _picture(self, image: int) -> Tensor:
        if isinstance(self._images, ArrayImages):
            return torch.from_numpy(self._images.images[image]).permute(2, 0, 1)
        picture = decode(self._images.read(image), self._images.name(image))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class TorchvisionEngine(Engine):
    """Makes views by a DataLoader with `workers` processes per stream of requests."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def views(self, requests: Iterator[Request]) -> Generator[Made]:
        device, on_gpu = self._setup.device, self._setup.device.type == "cuda"
        loader = DataLoader(
            _Worker(self._setup),
            batch_size=None,  # an item is a whole batch already
            sampler=_InOrder(requests),
            collate_fn=_unchanged,
            num_workers=self._setup.workers,
            pin_memory=on_gpu,
        )
        # A forked worker that collected garbage of its parent, such as a DALI pipeline, would wait for
        # threads that it does not have.
        gc.freeze()
        try:
            answers = iter(loader)
        finally:
            gc.unfreeze()
        try:
            for answer in answers:
                if isinstance(answer, DataError):
                    raise answer
                self._setup.bad_files.found.update(answer.bad)
                views = [view.to(device, non_blocking=on_gpu) for view in answer.made.views]
                yield Made(views, answer.made.index)
        finally:
            # Workers that wait for the garbage collection of an error's traceback are not told to stop, and
            # torch waits 5 s for each.
            del answers


def _unchanged(answer: Any) -> Any:
    return answer


class _InOrder:
    """The requests as a DataLoader's sampler."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests
