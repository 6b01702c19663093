"""Labels as people write them: what counts as no label, which numbers are equal, and which names mean one class."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.errors import SourceError

WHOLE = re.compile(r"([+-]?\d{1,4000})(\.0*)?")
"""A whole number as text. pandas writes 3 as 3.0 if a value of its column is missing. Python refuses to convert more
than 4,300 digits."""

NO_LABEL = ("", "nan", "null")
"""Texts that say that an image has no label, in small or capital letters; so does any whole number below 0."""


def label_text(value: Any) -> str | None:
    """Return a label as text, whole numbers as their digits alone, or None if the value says that there is no label."""
    if not isinstance(value, (str, int, float)):  # bool is a kind of int
        return None
    text = str(value).strip()
    whole = WHOLE.fullmatch(text)
    if whole is not None:
        number = int(whole[1])
        return str(number) if number >= 0 else None
    return None if text.lower() in NO_LABEL else text


def class_key(name: str) -> int | str:
    """Return what classes are compared by: the number that a name is, or else the name in composed Unicode."""
    text = name.strip()
    whole = WHOLE.fullmatch(text)
    return unicodedata.normalize("NFC", text) if whole is None else int(whole[1])


def class_keys(names: Iterable[str]) -> list[int | str]:
    """Return the key of each name."""
    return [class_key(name) for name in names]


def numbered(names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Return the classes of some names, in the order of the alphabet, and the number of each name.

    Names of one `class_key`, such as 1 and 01 or two forms of Unicode, are one class, called by the first of them.
    """
    first: dict[int | str, str] = {}
    names = sorted(set(names))
    for name in names:
        first.setdefault(class_key(name), name)
    places = {key: number for number, key in enumerate(first)}
    return [*first.values()], {name: places[class_key(name)] for name in names}


def repeated(names: Iterable[str]) -> set[int | str]:
    """Return the keys of the names that a list has more than once."""
    return {key for key, count in Counter(class_keys(names)).items() if count > 1}


def are_numbers(classes: Sequence[str] | None) -> bool:
    """Return whether classes are known by their numbers: they have no names, or all names are whole numbers."""
    return classes is None or all(isinstance(key, int) for key in class_keys(classes))


def number_labels(
    written: Iterable[Any], classes: list[str] | None, source: str
) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Return labels as int64 [N], -1 for no label, and the class names; None and None if no image has a label.

    Labels that are all whole numbers stay as they are. Names are numbered in the order of `classes`, or if that is
    None, in the order of the alphabet.

    Args:
        written: N labels, see `label_text`.
        classes: the name of each class number, if the source lists them.
        source: the name of the source, for messages.

    Raises:
        SourceError: a label is not among `classes`, is a name that `classes` has twice, or is a number that int64
            cannot hold.
    """
    labels = [label_text(label) for label in written]
    found = sorted({label for label in labels if label is not None})
    if not found:
        return None, None
    if all(WHOLE.fullmatch(label) for label in found):
        numbers = {label: int(label) for label in found}
    elif classes is None:
        classes, numbers = numbered(found)
    else:
        places = {key: number for number, key in enumerate(class_keys(classes))}
        numbers = {label: places.get(class_key(label), len(classes)) for label in found}
        twice = repeated(classes)
        for label in found:
            if class_key(label) in twice:
                raise SourceError(
                    f"{source} has the label '{label}', but classes.txt contains that name more than once. Give every "
                    "class a unique name, or write labels as numbers."
                )
    for label in found:
        if classes is not None and numbers[label] >= len(classes):
            raise SourceError(
                f"{source} has the label '{label}', which is not in classes.txt. Labels must be names in this file, or "
                f"all be numbers from 0 to {len(classes) - 1}. Correct the label, or add the class to classes.txt."
            )
    return label_array([-1 if label is None else numbers[label] for label in labels], source), classes


def label_array(labels: list[int], source: str) -> NDArray[np.int64]:
    """Return labels as int64 [N].

    Raises:
        SourceError: a label is a number that int64 cannot hold.
    """
    try:
        return np.array(labels, dtype=np.int64)
    except OverflowError as error:
        raise SourceError(f"{source} has the label {max(labels)}, which does not fit in 64 bits.") from error
