"""`fastgessl embed`: the features of a folder of images, or of an .npz, as one .npz with the file names."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgessl import pipelines, runs
from fastgessl.config import UsageError
from fastgessl.distributed import build_accelerator
from fastgessl.evaluate.extraction import Extractor
from fastgessl.evaluate.subject import Subject, base_config, open_subject
from fastgessl.recipes import Parser, override


def main(words: list[str]) -> None:
    """Run the command. UsageError or DataError for what cannot be done."""
    parser = Parser(
        program="embed", description=__doc__, epilog="Further options as of `fastgessl evaluate`."
    )
    parser.add_argument("target", help="the folder of a run, timm:NAME, or a .safetensors file")
    parser.add_argument("path", type=Path, help="folder of images, or an .npz")
    parser.add_argument(
        "--out", type=Path, default=Path("embeddings.npz"), help="file to write (default: embeddings.npz)"
    )
    given, options = parser.parse_known_args(words)
    config = override(base_config(given.target), options, f"embed {given.target}")
    count = embed(open_subject(given.target, config), given.path, given.out)
    print(f"{count} images: {given.out}")


def embed(subject: Subject, path: Path, out: Path) -> int:
    """Write `out`: features (N, F) float32, files (N,) names below `path`, and labels (N,) with classes where
    folders are classes.

    Every image under `path` once, in the order of the names, both splits of a folder that has them, without
    augmentation; bad files that are skipped have no row. Returns N. UsageError for features that are NaN, or
    where `out` cannot be written.
    """
    accelerator = build_accelerator(subject.config, subject.folder)
    if accelerator.num_processes > 1:
        raise UsageError("embed runs on one process. Start it without a launcher of several.")
    extractor = Extractor(subject.config, accelerator)
    encoder = subject.encoder.to(accelerator.device)
    features, files, labels = [], [], []
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        images = pipelines.open_images("npz" if path.suffix == ".npz" else "folder", path, split)
        if images is None:
            continue
        (found,) = extractor.features("this run", encoder, split, images, [extractor.still])
        found.require_finite(str(path))
        features.append(found.features.numpy())
        paths = getattr(images, "paths", None)
        for image in found.index.tolist():
            files.append(f"{split}/{image}" if paths is None else paths[image].relative_to(path).as_posix())
        labels.append(found.labels)
        classes = images.classes or classes
    arrays: dict[str, NDArray[np.generic]] = {"features": np.concatenate(features), "files": np.array(files)}
    if all(each is not None for each in labels):
        arrays |= {
            "labels": np.concatenate([each.numpy() for each in labels if each is not None]),
            "classes": np.array(classes),
        }
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    runs.write_bytes(out, packed.getvalue())
    return len(files)
