"""Data sets that may be fetched by name: downloaded where the network allows, unpacked where the archive
already lies there.
"""

from __future__ import annotations

from pathlib import Path

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.sources.imagenet import TINY
from fastgessl.pipelines.sources.torchvision_sets import SETS, fetch_torchvision

_TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FETCHABLE = (*SETS, "tinyimagenet")


def fetch(name: str, root: Path) -> None:
    """Put the data set `name` under `root`, in the layout that `open_images` reads. Raises DataError where
    that does not succeed.
    """
    root.mkdir(parents=True, exist_ok=True)
    if name != "tinyimagenet":
        fetch_torchvision(name, root)
    elif not (root / TINY / "val" / "val_annotations.txt").is_file():
        _fetch_tiny(root)


def _fetch_tiny(root: Path) -> None:
    try:
        from torchvision.datasets.utils import download_and_extract_archive
    except ImportError as error:
        raise DataError(
            f"tinyimagenet is fetched with torchvision, which does not import ({error}). Install "
            "fastgessl[train]."
        ) from error
    try:
        download_and_extract_archive(_TINY_URL, str(root), md5=_TINY_MD5)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"tinyimagenet could not be downloaded ({error}). Put {_TINY_URL} into {str(root)!r} and run "
            "this again."
        ) from error
