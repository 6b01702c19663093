"""Segmentation by a linear layer on the feature of each patch: what the features say of places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import FAILURES, open_image
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import SourceError, UnreadableImage
from ijepa_enhanced.evaluate.linear import STRENGTHS, softmax_regression
from ijepa_enhanced.evaluate.tokens import (
    Counting,
    InferenceConfig,
    LabelledSource,
    help_store,
    stored_tokens,
    uncounted,
)
from ijepa_enhanced.randomness import Purpose, generator

IGNORED = 255
"""The label of pixels that do not count: PASCAL VOC's."""
MOST_PATCHES = 2**18
"""Of the training images that are shown: 1,300 images of 196 patches. Their features take 4 * D bytes each."""


@dataclass(frozen=True)
class LabelledMaps(LabelledSource):
    """Images with the label of each of their pixels."""

    label_map: Callable[[int], NDArray[np.uint8]]
    """The labels [h, w] of the upright image in a row of the source; raises UnreadableImage."""


def open_maps(spec: str, part: str) -> LabelledMaps:
    """The images and label maps that `spec` describes.

    Args:
        spec: `synthetic`, or a folder with images in `images` and for each of them a PNG of the same name in `labels`,
            of one channel or with a palette, whose values are the labels and 255 where nothing is to be said.
        part: of the synthetic images.

    Raises:
        SourceError: there are no such images.
    """
    if spec == "synthetic":
        source = open_source(spec, part)
        return LabelledMaps(source, open_catalog(source), partial(synthetic.label_map, part))
    root = Path(spec).expanduser()
    if not ((root / "images").is_dir() and (root / "labels").is_dir()):
        raise SourceError(
            f"{spec} has no label maps: the dense probe needs 'synthetic', or a folder with images in 'images' and for "
            "each of them a PNG of the same name in 'labels'."
        )
    source = open_source(str(root / "images"), part)
    paths = [(root / "labels" / key).with_suffix(".png") for key in source.listing.keys]
    return LabelledMaps(source, open_catalog(source), lambda row: _read_map(paths[row]))


def _read_map(path: Path) -> NDArray[np.uint8]:
    try:
        image = open_image(path.read_bytes())
        labels = np.array(image)
    except FAILURES as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableImage(f"The label map {path} cannot be read: {reason}.") from error
    if image.mode not in ("L", "P"):
        raise UnreadableImage(f"{path} is no label map: it has the mode {image.mode}, not L or P.")
    return labels


def dense(
    encoder: Encoder,
    train: LabelledMaps,
    val: LabelledMaps,
    setting: InferenceConfig,
    seed: int = 0,
    counting: Counting = uncounted,
) -> Iterator[tuple[str, float]]:
    """`dense_miou`: the mean over classes of intersection over union of all pixels of `val`, at the maps' own size.

    Softmax regression on standardised tokens, trained with the cross-entropy of all pixels of a patch. Of
    `linear.STRENGTHS` the one is chosen that has the least on a fifth of the labelled training images; the layer is
    then trained on all of them.

    Args:
        encoder: in evaluation mode.
        train, val: images with label maps. Of `train` no more are used than have `MOST_PATCHES`, drawn by `seed`.
        setting: how images are shown to the encoder.
        seed: of that draw and of the held-out part.
        counting: shows progress.

    Raises:
        UnreadableImage: no image of a source can be decoded, or a label map cannot be read or is not of its image's
            size.
        SourceError: `val` has a label that `train` has not, or the label maps of one of them label nothing.
        NotFiniteError: a feature is not finite.
    """
    rng = generator(seed, Purpose.PROTOCOL)
    catalog = train.catalog
    grids = fit_grids(
        catalog.heights, catalog.widths, setting.resolution, encoder.config.patch_size, setting.tokens_per_pack
    )
    order = rng.permutation(len(catalog.rows))
    few = np.sort(order[np.cumsum(grids[order].prod(axis=1)) <= MOST_PATCHES])
    chosen = LabelledSource(train.source, catalog.select(few))
    if not setting.ranks.main:
        help_store(encoder, (chosen, val), setting)
        return
    with stored_tokens(encoder, chosen, setting, counting) as tokens:
        x = tokens.values.float()
        maps = [_map_of(train, row) for row in tokens.image_ids.tolist()]
        classes = np.unique(np.concatenate([np.unique(labels) for labels in maps]))
        classes = classes[classes != IGNORED]
        _need_labels(len(classes), train)
        counts = torch.cat(
            [patch_labels(labels, grid, classes) for labels, grid in zip(maps, tokens.grids.tolist(), strict=True)]
        )
        image_of = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.lengths)
    std, mean = torch.std_mean(x, dim=0, correction=0)
    std = std.masked_fill((x == x[0]).all(dim=0), torch.inf)
    labelled = counts.sum(dim=1) > 0
    x = F.pad((x[labelled] - mean) / std, (0, 1), value=1.0)
    image_of = image_of[labelled].unique(return_inverse=True)[1]  # counting those only that have a label somewhere
    targets = counts[labelled] / counts[labelled].sum(dim=1, keepdim=True)
    images = int(image_of.max()) + 1
    # Of fewer than five images too one is held out, or there would be nothing to choose by.
    held_out = torch.from_numpy(rng.permutation(images) % 5 == min(4, max(1, images - 1)))[image_of]
    layers = softmax_regression(x[~held_out], targets[~held_out], STRENGTHS)
    losses = torch.stack([F.cross_entropy(x[held_out] @ layer, targets[held_out]) for layer in layers])
    best = int(losses.argmin())
    head = softmax_regression(x, targets, STRENGTHS[best : best + 1], layers[best])[0]

    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    with stored_tokens(encoder, val, setting, counting) as tokens:
        views = tokens.values.split(tokens.lengths.tolist())
        for row, grid, view in zip(tokens.image_ids.tolist(), tokens.grids.tolist(), views, strict=True):
            labels = _map_of(val, row)
            logits = F.pad((view.float() - mean) / std, (0, 1), value=1.0) @ head
            whole = logits.T.view(1, -1, *grid)
            predicted = F.interpolate(whole, size=labels.shape, mode="bilinear", align_corners=False)[0].argmax(dim=0)
            counted = labels != IGNORED
            unknown = np.setdiff1d(labels[counted], classes)
            if len(unknown):
                raise SourceError(
                    f"The label map of {val.source.key(row)} of {val.source.name} has the label {unknown[0]}, which "
                    f"none of {train.source.name} has."
                )
            places = np.searchsorted(classes, labels[counted]) * len(classes) + predicted.numpy()[counted]
            confusion += np.bincount(places, minlength=confusion.size).reshape(confusion.shape)
    _need_labels(confusion.sum(), val)
    yield "dense_miou", mean_iou(confusion)


def _need_labels(labels: int, maps: LabelledMaps) -> None:
    if not labels:
        raise SourceError(f"The label maps of {maps.source.name} label nothing: every pixel is {IGNORED}.")


def _map_of(maps: LabelledMaps, row: int) -> NDArray[np.uint8]:
    labels = maps.label_map(row)
    image = int(np.searchsorted(maps.catalog.rows, row))
    size = int(maps.catalog.heights[image]), int(maps.catalog.widths[image])
    if labels.shape != size:
        raise UnreadableImage(
            f"The label map of {maps.source.key(row)} of {maps.source.name} has {labels.shape[0]} x {labels.shape[1]} "
            f"px, but the image {size[0]} x {size[1]}."
        )
    return labels


def patch_labels(labels: NDArray[np.uint8], grid: tuple[int, int], classes: NDArray[np.uint8]) -> Tensor:
    """How many pixels of each class lie in each patch: float32 [rows * columns, C].

    A pixel belongs to the patch that its centre lies in.

    Args:
        labels: [h, w], of which those in `classes` [C], ascending, count.
        grid: rows and columns of patches.
        classes: the labels of the columns.
    """
    (height, width), (rows, cols) = labels.shape, grid
    row, col = (((2 * np.arange(n) + 1) * parts) // (2 * n) for n, parts in ((height, rows), (width, cols)))
    patch = row[:, None] * cols + col
    counted = np.isin(labels, classes)
    places = patch[counted] * len(classes) + np.searchsorted(classes, labels[counted])
    counts = np.bincount(places, minlength=rows * cols * len(classes)).reshape(-1, len(classes))
    return torch.from_numpy(counts).float()


def mean_iou(confusion: NDArray[np.int64]) -> float:
    """The mean over classes of intersection over union, without classes that are neither there nor predicted.

    Args:
        confusion: [C, C] pixels of each true class (rows) and predicted class (columns), at least one.
    """
    both = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return float((both[union > 0] / union[union > 0]).mean())
