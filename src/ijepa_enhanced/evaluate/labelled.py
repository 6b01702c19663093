"""Pairs of labelled sources: images to learn from and images to score on, with classes that mean the same."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.catalog import open_catalog, report_unreadable
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RequestError, RunError
from ijepa_enhanced.evaluate.tokens import LabelledSource
from ijepa_enhanced.randomness import Purpose, generator

logger = logging.getLogger(__name__)

VAL_SHARE = 0.2
"""Of each class, for validation, where one source is split."""


def labelled(spec: str, part: str, reported: LabelledSource | None = None) -> LabelledSource:
    """Return a source and the catalog of its labelled images, and log which images are left out.

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
        raise RequestError(
            f"{spec} has no labels, but evaluation needs them. Put the images of each class into a subfolder, "
            "or add a .cls file for each image of a tar shard."
        )
    new = reported is None or reported.source.fingerprint() != source.fingerprint()
    if new:
        report_unreadable(catalog, f"Left out of {spec}")
    if not len(catalog.rows):
        raise RunError(f"None of the {len(catalog.unreadable)} images of {spec} can be read.")
    known = np.flatnonzero(catalog.labels >= 0)
    if len(known) < len(catalog.rows):
        missing = len(catalog.rows) - len(known)
        if new:
            logger.warning("Left out of %s: %d of %d images, which have no label.", spec, missing, len(catalog.rows))
        catalog = catalog.select(known)
    return LabelledSource(source, catalog)


def labelled_pair(train_spec: str, val_spec: str) -> list[LabelledSource]:
    """Return the images of training and validation, the latter's classes numbered as the former's.

    Raises:
        RequestError: there are no labels, there is only one class, or a class of validation is missing in training.
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
    """Split the labelled images of one source into training and validation: a fifth of each class is for validation.

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
    val: list[int] = []
    for label in np.unique(images.catalog.labels):
        own = order[images.catalog.labels[order] == label]
        val += own[: max(1, round(len(own) * VAL_SHARE)) if len(own) > 1 else 0].tolist()
    if not val:
        raise RequestError(f"{spec} has only one image of each class. Evaluation needs a class with two or more.")
    rows = np.sort(np.array(val))
    parts = (np.setdiff1d(np.arange(len(order)), rows), rows)
    return [LabelledSource(images.source, images.catalog.select(part)) for part in parts]


def _need_classes(images: LabelledSource, spec: str) -> None:
    assert images.catalog.labels is not None
    only = np.unique(images.catalog.labels)
    if len(only) < 2:
        raise RequestError(
            f"{spec} has images of only one class, '{images.catalog.class_name(only[0])}'. "
            "Evaluation needs two or more."
        )


def class_numbers(train: LabelledSource, val: LabelledSource) -> NDArray[np.int64]:
    """Return the labels of the validation source as the training source numbers their classes: int64 [N].

    Raises:
        RequestError: a class that has images in the validation source has none in the training source.
    """
    assert train.catalog.labels is not None
    assert val.catalog.labels is not None
    found, inverse = np.unique(val.catalog.labels, return_inverse=True)
    numbers = found
    if train.catalog.classes is not None and val.catalog.classes is not None:
        places = {name: number for number, name in enumerate(train.catalog.classes)}
        numbers = np.array([places.get(val.catalog.class_name(label), -1) for label in found.tolist()])
    for label, number in zip(found.tolist(), numbers.tolist(), strict=True):
        if number not in train.catalog.labels:
            name = val.catalog.class_name(label)
            listed = train.catalog.classes is not None and name in train.catalog.classes
            lacks = (
                f"but {train.source.name} has no readable image of it"
                if listed
                else f"but {train.source.name} does not"
            )
            raise RequestError(f"{val.source.name} has a class '{name}', {lacks}.")
    return numbers[inverse]
