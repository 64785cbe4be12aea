"""Images from one .npz file: arrays train_x, and if there are any train_y, test_x, test_y, classes."""

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import ArrayImages, numbered_classes

_HOW = "Write it with np.savez(path, train_x=images)."
# What numpy and zipfile raise for damaged or hostile files, found by fuzzing.
_BROKEN = (
    *(OSError, ValueError, TypeError, EOFError, OverflowError, MemoryError, SystemError, SyntaxError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def read_npz(path: Path, split: str) -> ArrayImages | None:
    """The `split` ("train" or "test") of an .npz; None if the file has no test images. Raises DataError for
    whatever does not fit.
    """
    if not path.is_file():
        raise DataError(
            f"data.root {str(path)!r} is not a file. Point --data.root at the .npz that holds train_x."
        )
    arrays = _arrays(path, split)
    if f"{split}_x" not in arrays:
        return None
    images = _images(arrays[f"{split}_x"], f"{split}_x", path)
    labels = {
        name: _labels(arrays[f"{name}_y"], f"{name}_y", path)
        for name in ("train", "test")
        if f"{name}_y" in arrays
    }
    own = labels.get(split)
    if own is not None and len(own) != len(images):
        raise DataError(
            f"{path}: {split}_y has {len(own)} labels for the {len(images)} images of {split}_x. Give one "
            "label an image."
        )
    largest, name = max(
        ((int(values.max()), f"{name}_y") for name, values in labels.items() if len(values)), default=(-1, "")
    )
    names = arrays.get("classes")
    classes = (
        numbered_classes(largest, f"{path}: {name}")
        if names is None
        else _class_names(names, largest + 1, path)
    )
    return ArrayImages(images, own, classes)


def _arrays(path: Path, split: str) -> dict[str, NDArray[Any]]:
    """The images of `split`, the labels of both (they number the classes together) and the class names, as
    far as the file has them.
    """
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise DataError(f"{path} holds one array, not an archive of named ones. {_HOW}")
        with opened as archive:
            if "train_x" not in archive.files:
                found = " ".join(", ".join(archive.files).split()) or "nothing"
                raise DataError(f"{path} holds no images: train_x is missing (found {found}). {_HOW}")
            wanted = [
                name for name in (f"{split}_x", "train_y", "test_y", "classes") if name in archive.files
            ]
            _require_fits(archive.zip, wanted, path)
            arrays = {name: archive[name] for name in wanted}
    except DataError:
        raise
    except _BROKEN as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path} cannot be read as an .npz of plain arrays ({reason}). {_HOW}") from error
    if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path}: {other[0]} is no array. {_HOW}")
    return arrays


def _require_fits(archive: zipfile.ZipFile, wanted: Sequence[str], path: Path) -> None:
    """Before anything is unpacked, since small files can state and hold huge arrays; zipfile reads no more
    than a member states.
    """
    sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
    unpacked = sum(sizes.get(name, 0) for name in wanted)
    if unpacked > _memory():
        raise DataError(
            f"{path} would unpack to {unpacked / 2**30:,.1f} GiB, more than this machine's memory. Give the "
            "images as files in a folder."
        )


def _memory() -> int:
    """Bytes of this machine."""
    return psutil.virtual_memory().total


def _images(array: NDArray[Any], name: str, path: Path) -> NDArray[np.uint8]:
    """uint8 (N, H, W[, 1 or 3]) -> (N, H, W, 3)."""
    if array.dtype != np.uint8:
        raise DataError(
            f"{path}: {name} must be uint8 (0 to 255), found {array.dtype}. Scale and convert it first."
        )
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: {name} must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), found {array.shape}. "
            "Transpose it first."
        )
    if array.size == 0:
        raise DataError(
            f"{path}: {name} holds no images, its shape is {array.shape}. Put at least one batch there."
        )
    if array.ndim == 3:
        array = array[..., None]
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else np.ascontiguousarray(array)


def _labels(array: NDArray[Any], name: str, path: Path) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu" or array.ndim < 1 or array.size != len(array):
        raise DataError(
            f"{path}: {name} must be (N,) integers, found {array.shape} {array.dtype}. Number the classes "
            "from 0."
        )
    labels = array.reshape(-1).astype(np.int64)
    if len(labels) and labels.min() < 0:
        raise DataError(
            f"{path}: {name} holds the label {labels.min()}. Number the classes from 0, or leave {name} out."
        )
    return labels


def _class_names(names: NDArray[Any], count: int, path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or len(names) < count:
        raise DataError(
            f"{path}: classes has shape {names.shape}, but the labels go up to {count - 1}. Give one name a "
            "class."
        )
    try:
        return tuple(str(name) for name in names)
    except _BROKEN as error:  # characters that Unicode does not have
        raise DataError(f"{path}: classes holds what is no text ({error}). Give one name a class.") from error
