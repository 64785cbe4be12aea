"""Labels as numbers of classes, counted from 0."""

from __future__ import annotations

from fastgessl.pipelines.errors import DataError

# Fifty times ImageNet-21k's. A date or a serial number taken for a label would name as many classes as it
# counts.
_MOST_CLASSES = 1 << 20


def numbered_classes(largest: int, place: str) -> tuple[str, ...]:
    """The names "0", "1", … of classes whose largest number is `largest`. Raises DataError, naming the
    `place`, if it cannot be one.

    >>> numbered_classes(2, "the list")
    ('0', '1', '2')
    """
    if largest >= _MOST_CLASSES:
        raise DataError(
            f"{place} holds the label {largest}, and labels number the classes from 0. Number them closely."
        )
    return tuple(map(str, range(largest + 1)))
