"""Where images come from and how views of them are made: one interface, three engines, one pure sampler.

Import it as `fastgessl.pipelines`. Nothing heavy is imported until an engine or a data set needs it.
"""

if __name__ != "fastgessl.pipelines":
    raise ImportError(
        f"this package is fastgessl.pipelines, but was imported as {__name__!r}, which would load it twice. "
        "Write `import fastgessl.pipelines`."
    )

from fastgessl.pipelines.loader import Batch, Loader, build, choose_engine
from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.images import ArrayImages, FileImages, ShardImages
from fastgessl.pipelines.sources.named import NAMES, open_images
from fastgessl.pipelines.views import ViewSpec, count_views, evaluation_view, view_preset

__all__ = [
    "NAMES",
    "ArrayImages",
    "Batch",
    "DataError",
    "FileImages",
    "Loader",
    "ShardImages",
    "ViewSpec",
    "build",
    "choose_engine",
    "count_views",
    "evaluation_view",
    "open_images",
    "view_preset",
]
