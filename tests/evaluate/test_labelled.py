"""Pairs of labelled sources: images without a label are left out, and one source can be split into two."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate import labelled as labelled_module
from ijepa_enhanced.evaluate.labelled import labelled, labelled_pair, split_labelled


def relabel(monkeypatch: pytest.MonkeyPatch, labels: list[int]) -> None:
    """Give the images of every source these labels, as many times over as there are images."""

    def with_labels(source: Source) -> Catalog:
        catalog = open_catalog(source)
        return dataclasses.replace(catalog, labels=np.resize(np.array(labels, dtype=np.int64), len(catalog.rows)))

    monkeypatch.setattr(labelled_module, "open_catalog", with_labels)


def labels_of(catalog: Catalog) -> NDArray[np.int64]:
    assert catalog.labels is not None
    return catalog.labels


def test_images_without_a_label_are_left_out_and_counted(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    relabel(monkeypatch, [1, -1, 0, 0, -1])
    found = labelled(str(pictures), "train")
    assert found.catalog.rows.tolist() == [0, 2, 3, 5, 7, 8]
    assert labels_of(found.catalog).tolist() == [1, 0, 0, 1, 0, 0]
    assert caplog.messages[-1:] == [f"Skipped 4 of 10 images of {pictures}, which have no label."]
    for each in labelled_pair(str(pictures), str(pictures)):
        assert labels_of(each.catalog).min() == 0


def test_a_source_with_all_labels_is_whole_and_gives_no_warning(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = labelled(str(pictures), "train")
    assert found.catalog.rows.tolist() == list(range(10))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_source_of_which_no_image_has_a_label_is_an_error(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(monkeypatch, [-1])
    with pytest.raises(RequestError, match="has no labels, but evaluation needs them"):
        labelled(str(pictures), "train")


def test_a_split_is_stratified_disjoint_and_fixed_by_the_seed() -> None:
    train, val = split_labelled("synthetic", seed=3)
    rows = np.concatenate([train.catalog.rows, val.catalog.rows])
    source = open_source("synthetic", "train")
    assert sorted(rows.tolist()) == list(range(len(source)))
    for counts in zip(np.bincount(labels_of(train.catalog)), np.bincount(labels_of(val.catalog)), strict=True):
        # A fifth of the class, to the nearest image.
        assert abs(counts[1] - sum(counts) / 5) <= 0.5
    assert (np.diff(val.catalog.rows) > 0).all()
    assert split_labelled("synthetic", seed=3)[1].catalog.rows.tolist() == val.catalog.rows.tolist()
    assert split_labelled("synthetic", seed=4)[1].catalog.rows.tolist() != val.catalog.rows.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_every_class_that_is_scored_can_be_learned(pictures: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Classes of six, two, one and one images: the last two cannot be scored on."""
    relabel(monkeypatch, [0] * 6 + [1, 1, 2, 3])
    train, val = split_labelled(str(pictures), seed)
    assert np.bincount(labels_of(train.catalog)).tolist() == [5, 1, 1, 1]
    assert np.bincount(labels_of(val.catalog)).tolist() == [1, 1]


def test_unlabelled_images_are_in_neither_part(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(monkeypatch, [0, 1, -1, 0, 1])
    train, val = split_labelled(str(pictures), 0)
    assert sorted([*train.catalog.rows.tolist(), *val.catalog.rows.tolist()]) == [0, 1, 3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1], "has images of only one class, 'light'"), (list(range(10)), "has only one image of each class")],
)
def test_what_cannot_be_split_is_an_error(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], message: str
) -> None:
    relabel(monkeypatch, labels)
    with pytest.raises(RequestError, match=message):
        split_labelled(str(pictures), 0)
