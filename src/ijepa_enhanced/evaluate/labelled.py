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

logger = logging.getLogger(__name__)


def labelled(spec: str, part: str) -> LabelledSource:
    """A source and its catalog.

    Raises:
        RequestError: the source has no labels.
        RunError: it has no image that can be read.
    """
    source = open_source(spec, part)
    catalog = open_catalog(source)
    if catalog.labels is None:
        raise RequestError(
            f"{spec} has no labels, and scoring needs them: put the images of each class into a folder of its own, "
            "or a .cls file beside each image of a shard."
        )
    report_unreadable(catalog, f"Left out of {spec}")
    if not len(catalog.rows):
        raise RunError(f"None of the {len(catalog.unreadable)} images of {spec} can be read.")
    return LabelledSource(source, catalog)


def labelled_pair(train_spec: str, val_spec: str) -> list[LabelledSource]:
    """The images of training and validation, the latter's classes numbered as the former's.

    Raises:
        RequestError: images lack labels, there is one class only, or a class of validation is missing in training.
    """
    train, val = (labelled(*spec) for spec in ((train_spec, "train"), (val_spec, "val")))
    assert train.catalog.labels is not None
    assert val.catalog.labels is not None
    only = np.unique(train.catalog.labels)
    if len(only) < 2:
        raise RequestError(
            f"{train_spec} has images of one class only, '{train.catalog.class_name(only[0])}'; "
            "scoring needs two or more."
        )
    numbers = class_numbers(train, val)
    if train.source.fingerprint() == val.source.fingerprint():
        logger.warning("%s: the same images for training and validation, so scores say nothing of others.", val_spec)
    return [train, LabelledSource(val.source, dataclasses.replace(val.catalog, labels=numbers))]


def class_numbers(train: LabelledSource, val: LabelledSource) -> NDArray[np.int64]:
    """The labels of the validation source as the training source numbers their classes: int64 [N].

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
                f"of which {train.source.name} has no readable image" if listed else f"that {train.source.name} has not"
            )
            raise RequestError(f"{val.source.name} has a class '{name}' {lacks}.")
    return numbers[inverse]
