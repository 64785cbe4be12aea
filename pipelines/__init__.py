"""Where images come from and how views of them are made: one interface, three engines, one pure sampler.

Import it as `fastgessl.pipelines`. Nothing heavy is imported until an engine or a data set needs it.
"""

if __name__ != "fastgessl.pipelines":
    raise ImportError(
        f"this package is fastgessl.pipelines, but was imported as {__name__!r}, which would load it twice. "
        "Write `import fastgessl.pipelines`."
    )

from fastgessl.pipelines.errors import DataError
from fastgessl.pipelines.images import ArrayImages, FileImages
from fastgessl.pipelines.loader import Batch, Loader, build, choose_engine
from fastgessl.pipelines.named import open_images
from fastgessl.pipelines.specs import ViewSpec, evaluation_view, view_preset

__all__ = [
    "ArrayImages",
    "Batch",
    "DataError",
    "FileImages",
    "Loader",
    "ViewSpec",
    "build",
    "choose_engine",
    "evaluation_view",
    "open_images",
    "view_preset",
]
