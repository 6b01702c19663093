"""Pairs of labeled sources: images to learn from and images to score on, with classes that mean the same."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.catalog import open_catalog, report_unreadable
from ijepa_enhanced.data.sources.labels import are_numbers, class_key, class_keys, repeated
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RequestError, RunError
from ijepa_enhanced.evaluate.tokens import LabelledSource
from ijepa_enhanced.randomness import Purpose, generator

logger = logging.getLogger(__name__)

VAL_PERCENT = 20
"""Of each class, for validation, where one source is split."""


def labelled(spec: str, part: str, reported: LabelledSource | None = None) -> LabelledSource:
    """Return a source and the catalog of its labeled images, and log which images are skipped.

    Args:
        spec: the source.
        part: `train` or `val`.
        reported: images that were logged already; the same ones are not logged again.

    Raises:
        RequestError: the source has no labels.
        RunError: it has no image that can be read.
    """
    source = open_source(spec, part)
    catalog = open_catalog(source)
    if catalog.labels is None or (len(catalog.labels) and catalog.labels.max() < 0):
        for note in source.listing.notes:  # it may be the reason
            logger.warning("%s", note)
        raise RequestError(f"{spec} has no labels, but evaluation needs them. {source.how_to_label}")
    new = reported is None or reported.source.fingerprint() != source.fingerprint()
    if new:
        report_unreadable(catalog, spec)
    if not len(catalog.rows):
        raise RunError(f"None of the {len(catalog.unreadable)} images of {spec} can be read.")
    known = np.flatnonzero(catalog.labels >= 0)
    if len(known) < len(catalog.rows):
        missing = len(catalog.rows) - len(known)
        if new:
            logger.warning("Skipped %d of %d images of %s, which have no label.", missing, len(catalog.rows), spec)
        catalog = catalog.select(known)
    return LabelledSource(source, catalog)


def labelled_pair(train_spec: str, val_spec: str) -> list[LabelledSource]:
    """Return the images of training and validation, the latter's classes numbered as the former's.

    Raises:
        RequestError: there are no labels, there is only one class, or see `class_numbers`.
        RunError: none of a source's images can be read.
    """
    train = labelled(train_spec, "train")
    val = labelled(val_spec, "val", reported=train)
    assert val.catalog.labels is not None
    _need_classes(train, train_spec)
    numbers = class_numbers(train, val)
    if train.source.fingerprint() == val.source.fingerprint():
        logger.warning("%s is used for training and validation, so the scores do not measure generalization.", val_spec)
    return [train, LabelledSource(val.source, dataclasses.replace(val.catalog, labels=numbers))]


def split_labelled(spec: str, seed: int) -> list[LabelledSource]:
    """Split the labeled images of one source into training and validation: a fifth of each class is for validation.

    A class of fewer than five images gives one, and a class of a single image none: probes could not learn it.

    Args:
        spec: the source.
        seed: of the split.

    Raises:
        RequestError: there are no labels, only one class, or no class of two or more images.
        RunError: none of the images can be read.
    """
    images = labelled(spec, "train")
    _need_classes(images, spec)
    assert images.catalog.labels is not None
    order = generator(seed, Purpose.HOLDOUT).permutation(len(images.catalog.rows))
    val = share_of_classes(images.catalog.labels, VAL_PERCENT, order, from_single=False)
    if not len(val):
        raise RequestError(f"{spec} has only one image of each class. Evaluation needs a class with two or more.")
    parts = (np.setdiff1d(np.arange(len(order)), val), val)
    return [LabelledSource(images.source, images.catalog.select(part)) for part in parts]


def share_of_classes(
    labels: NDArray[np.int64], percent: int, order: NDArray[np.int64], from_single: bool = True
) -> NDArray[np.int64]:
    """Return a share of each class, rounded, and at least one image: rows of `labels` int64 [N], ascending.

    Args:
        labels: of N images.
        percent: of each class.
        order: a permutation of N rows; the first ones of each class are returned.
        from_single: also of classes with a single image.
    """
    order = order[labels[order].argsort(kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    wanted = np.maximum(1, np.rint(counts * percent / 100))
    if not from_single:
        wanted[counts == 1] = 0
    place = np.arange(len(order)) - np.repeat(starts, counts)
    return np.sort(order[place < np.repeat(wanted, counts)])


def _need_classes(images: LabelledSource, spec: str) -> None:
    assert images.catalog.labels is not None
    only = np.unique(images.catalog.labels)
    if len(only) < 2:
        raise RequestError(
            f"{spec} has images of only one class, '{images.catalog.class_name(only[0])}'. "
            "Evaluation needs two or more."
        )


def class_numbers(train: LabelledSource, val: LabelledSource) -> NDArray[np.int64]:
    """Return the labels of the validation source as the training source numbers their classes, and log the rule.

    Classes of one name are the same. Names that are whole numbers, and numbers without names, are compared as numbers.

    Returns:
        int64 [N].

    Raises:
        RequestError: one source numbers its classes and the other names them; two classes have the same name and the
            sources do not list the same names; or a class that has images in the validation source has none in the
            training source.
    """
    assert val.catalog.labels is not None
    found, inverse = np.unique(val.catalog.labels, return_inverse=True)
    rule = "number" if _are_numbered(train, val) else "name"
    present = set(_present(train))
    logger.info("Classes: %d, matched by %s.", len(present), rule)
    numbers = found if _list_the_same(train, val) else _places(train, val, found)
    for label, number in zip(found.tolist(), numbers.tolist(), strict=True):
        if number not in present:
            name = val.catalog.class_name(label)
            listed = train.catalog.classes is not None and number >= 0
            raise RequestError(
                f"Class '{name}' of {val.source.name} has no {'readable ' * listed}images in {train.source.name}. "
                "Every validation class must also occur in the training images. Add images of this class to the "
                "training images, or remove the class from the validation images."
            )
    return numbers[inverse]


def _are_numbered(train: LabelledSource, val: LabelledSource) -> bool:
    """Return whether both sources number their classes, or raise RequestError if only one does."""
    numbered: list[LabelledSource] = []
    named: list[LabelledSource] = []
    for images in (train, val):
        (numbered if are_numbers(images.catalog.classes) else named).append(images)
    if not numbered or not named:
        return not named
    first, second = ([each.catalog.class_name(label) for label in _present(each)] for each in (*numbered, *named))
    if numbered[0].catalog.classes is not None and {*class_keys(first)} & {*class_keys(second)}:
        return False  # names of both kinds
    raise RequestError(
        f"{numbered[0].source.name} has class numbers ({_some(first)}) and {named[0].source.name} has class names "
        f"({_some(second)}), so they cannot be matched. Use names in both: as names of folders, in the column 'label' "
        "of a list or a Parquet file, in the .cls files of shards, or in classes.txt beside the shards (one name per "
        "line, from class 0)."
    )


def _present(images: LabelledSource) -> list[int]:
    """Return the numbers of the classes that have images."""
    assert images.catalog.labels is not None
    found: list[int] = np.unique(images.catalog.labels).tolist()
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _list_the_same(train: LabelledSource, val: LabelledSource) -> bool:
    """Return whether both sources have the same list of class names; then equal numbers are the same class."""
    if train.catalog.classes is None or val.catalog.classes is None:
        return False
    return class_keys(train.catalog.classes) == class_keys(val.catalog.classes)


def _places(train: LabelledSource, val: LabelledSource, found: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number that the training source gives each class, or -1 if it does not list the class.

    Args:
        train: its numbers are returned.
        val: its classes are looked up.
        found: int64 [C], the classes of `val` that have images.

    Raises:
        RequestError: one of them has the name of another class.
    """
    names = [val.catalog.class_name(label) for label in found.tolist()]
    for images in (train, val):
        twice = repeated(images.catalog.classes or ())
        for name in names:
            if class_key(name) in twice:
                raise RequestError(
                    f"{images.source.name} has more than one class '{name}', and {train.source.name} and "
                    f"{val.source.name} do not list the same names. Give every class a unique name in classes.txt, or "
                    "use the same classes.txt for both sources."
                )
    listed = _present(train) if train.catalog.classes is None else range(len(train.catalog.classes))
    places = {class_key(train.catalog.class_name(label)): label for label in listed}
    return np.array([places.get(key, -1) for key in class_keys(names)], dtype=np.int64)
