"""Images from tar shards in WebDataset's layout: `key.jpg`, and `key.cls` with the number of its class if
there are labels.

The shards are read at random places, not streamed, so that the order of an epoch, its split over ranks and
its resumption are the same as for files.
"""

import tarfile
from pathlib import Path

import numpy as np

from fastgessl.pipelines.sources import DataError
from fastgessl.pipelines.sources.folder import EXTENSIONS
from fastgessl.pipelines.sources.images import ShardImages, numbered_classes

CLASS_NAMES = "classes.txt"
# WebDataset's convention: members of one sample share what stands before the first dot of their file name.
Sample = tuple[str, int, int, int]


def read_shards(root: Path, split: str) -> ShardImages | None:
    """The `split` ("train" or "test") of a folder of shards, or of one shard; None without test images.

    Training shards are root/train/*.tar, root/train-*.tar, or every *.tar of root if there are neither; test
    shards are those of val or test in their place. A file classes.txt beside the shards names the classes,
    one a line. Raises DataError if there is no shard, or one is broken.
    """
    shards = _shards(root, split)
    if not shards:
        if split == "test":
            return None
        raise DataError(
            f"data.root {str(root)!r} holds no tar shards (wanted train/*.tar, train-*.tar or *.tar). Point "
            "--data.root at them."
        )
    return _index(shards, _class_names(root))


def _shards(root: Path, split: str) -> list[Path]:
    if root.is_file():
        return [root] if split == "train" else []
    for name in ("train",) if split == "train" else ("val", "test"):
        for pattern in (f"{name}/*.tar", f"{name}-*.tar"):
            if found := sorted(root.glob(pattern)):
                return found
    return sorted(root.glob("*.tar")) if split == "train" else []


def _class_names(root: Path) -> tuple[str, ...]:
    path = (root.parent if root.is_file() else root) / CLASS_NAMES
    return (
        tuple(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
        if path.is_file()
        else ()
    )


def _index(shards: list[Path], classes: tuple[str, ...]) -> ShardImages:
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, shard in enumerate(shards):
        for name, offset, length, label in _samples(shard):
            names.append(name)
            places.append((number, offset, length))
            labels.append(label)
    if not names:
        raise DataError(
            f"{shards[0]} and {len(shards) - 1} further shards hold no {', '.join(EXTENSIONS)} files. Make "
            "them again."
        )
    if (unlabelled := labels.count(-1)) not in (0, len(labels)):
        first = names[labels.index(-1)]
        raise DataError(
            f"{unlabelled} of {len(labels)} images in the shards have no .cls beside them (first: {first}). "
            "Label all, or none."
        )
    shard, offset, length = np.array(places, dtype=np.int64).T
    if unlabelled:
        return ShardImages(tuple(shards), tuple(names), shard, offset, length)
    largest = max(labels)
    if not classes:
        classes = numbered_classes(largest, f"shard {str(shards[shard[labels.index(largest)]])!r}")
    elif largest >= len(classes):
        raise DataError(
            f"the shards have the class {largest}, but {CLASS_NAMES} names {len(classes)} classes. Name "
            "every class."
        )
    return ShardImages(
        tuple(shards), tuple(names), shard, offset, length, np.array(labels, dtype=np.int64), classes
    )


def _samples(shard: Path) -> list[Sample]:
    """(name, first byte, bytes, class or -1) of each image, in the order of the shard."""
    images: dict[str, Sample] = {}
    labels: dict[str, int] = {}
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                key, _, ending = file.partition(".")
                key = f"{folder}/{key}"
                if member.isreg() and member.offset_data + member.size > size:
                    raise DataError(
                        f"shard {str(shard)!r} ends within {member.name}. It was cut; make it again."
                    )
                if member.isreg() and ending.lower() in EXTENSIONS:
                    images[key] = (member.name, member.offset_data, member.size, -1)
                elif member.isreg() and ending == "cls":
                    content = archive.extractfile(member)
                    assert content is not None  # a regular member has content
                    labels[key] = int(content.read())
    except DataError:
        raise
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"shard {str(shard)!r} cannot be read ({error}). Make it again, or remove it."
        ) from error
    except ValueError as error:
        raise DataError(
            f"shard {str(shard)!r}: {key}.cls holds no number ({error}). Write the class's number there."
        ) from error
    if labels and min(labels.values()) < 0:
        raise DataError(
            f"shard {str(shard)!r} has the class {min(labels.values())}. Number the classes from 0."
        )
    return [(name, offset, length, labels.get(key, -1)) for key, (name, offset, length, _) in images.items()]
