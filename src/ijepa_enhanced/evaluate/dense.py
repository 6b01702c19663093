"""Segmentation by the features of patches, linear or by nearest patches: what features say about places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.devices import all_cores
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import SourceError
from ijepa_enhanced.evaluate.dense_knn import PatchNeighbors
from ijepa_enhanced.evaluate.label_maps import LabelledMaps, map_of
from ijepa_enhanced.evaluate.linear import STRENGTHS, rows_at_once, softmax_regression
from ijepa_enhanced.evaluate.standardize import moments, roomiest, scale
from ijepa_enhanced.evaluate.tokens import (
    Counting,
    InferenceConfig,
    LabelledSource,
    Tokens,
    check_space,
    help_store,
    stored_tokens,
    uncounted,
)
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.randomness import Purpose, generator

LABELS = 256
"""That a label map can have."""
IGNORED = 255
"""The label of pixels that do not count: PASCAL VOC's."""
MOST_PATCHES = 2**18
"""Of the training images that are used: 1,300 images of 196 patches. Memory holds one float32 copy of their features,
4 * D bytes a patch: 0.4 GB for a ViT-S."""
RESAMPLES = 1000
"""Bootstrap samples for a confidence interval. If scores are normally distributed, the standard error of each end is 2%
of the width: sqrt(0.025 * 0.975 / 1000) over the density 0.058 at that end, relative to 2 * 1.96."""


def dense(
    encoder: Encoder,
    train: LabelledMaps,
    val: LabelledMaps,
    config: InferenceConfig,
    seed: int = 0,
    counting: Counting = uncounted,
) -> Iterator[tuple[str, float]]:
    """Yield `dense_miou`, of a linear probe, and `dense_knn`, of nearest patches (see `PatchNeighbors`).

    Both are the mean over classes of intersection over union, over all pixels of the label maps of `val`. A class of
    `val` that none of the training images that are drawn has counts as one that is never found. Each is followed by
    NAME_low and NAME_high, its 95% confidence interval (see `bootstrap`).

    The linear probe is softmax regression on standardized tokens, trained with the cross-entropy of all pixels of a
    patch. Its strength is the one of `linear.STRENGTHS` with the least cross-entropy on a fifth of the labeled training
    images; the layer is then trained on all of them.

    Args:
        encoder: in evaluation mode.
        train, val: images with label maps. From `train`, at most as many as have `MOST_PATCHES` are drawn by `seed`.
        config: how images are shown to the encoder.
        seed: of that draw, of the held-out part and of the bootstrap.
        counting: shows progress.

    Raises:
        UnreadableImage: no image of a source can be decoded, or a label map cannot be read or is not of its image's
            size.
        SourceError: `val` has a label that `train` lacks, or the label maps of one of them label nothing.
        RequestError: the tokens do not fit on the disk; nothing has been computed.
        NotFiniteError: a feature is not finite.
    """
    rng = generator(seed, Purpose.PROTOCOL)
    catalog = train.catalog
    grids = fit_grids(
        catalog.heights, catalog.widths, config.resolution, encoder.config.patch_size, config.tokens_per_pack
    )
    order = rng.permutation(len(catalog.rows))
    few = np.sort(order[np.cumsum(grids[order].prod(axis=1)) <= MOST_PATCHES])
    chosen = LabelledSource(train.source, catalog.select(few))
    check_space("dense", encoder, (chosen, val), config)
    if not config.ranks.main:
        help_store(encoder, (chosen, val), config)
        return
    _need_same_labels(train, val)
    with stored_tokens(encoder, chosen, config, counting) as tokens, all_cores():
        classes, counts = _patches(tokens, train)
        linear = _fitted(tokens, classes, counts, rng, encoder.device)
        labeled = counts.sum(dim=1) > 0
        shares = counts[labeled] / counts[labeled].sum(dim=1, keepdim=True)
        neighbors = PatchNeighbors(classes, tokens.values[labeled], shares, encoder.device)
    with stored_tokens(encoder, val, config, counting) as tokens, all_cores():
        for name, probe in (("dense_miou", linear), ("dense_knn", neighbors)):
            areas = pixel_counts(probe, tokens, val)
            _need_labels(int(areas[:, 1].any()), val)  # images with labels may be those that cannot be decoded
            yield name, float(mean_iou(areas.sum(axis=0)))
            low, high = bootstrap(areas, generator(seed, Purpose.PROTOCOL, view=1))  # the same samples for both probes
            yield f"{name}_low", low
            yield f"{name}_high", high


class RawPatches(Encoder):
    """A baseline for dense scores: the feature of a patch is its normalized pixels, C * P * P numbers.

    The arguments are those of the encoder that it is compared with, whose weights it does not use.
    """

    @property
    def width(self) -> int:
        """Return D, the width of a feature."""
        return self.config.channels * self.config.patch_size**2

    def forward(self, packed: Packed, plan: MergePlan | None = None) -> Tensor:
        """Return the normalized pixels of the patches, [T, D]. Nothing is merged."""
        return self.normalize(packed).values

    def last_layers(self, packed: Packed, plan: MergePlan | None, count: int) -> list[Tensor]:
        """Return the same as the output of the last block."""
        return [self(packed)]


class _Probe(NamedTuple):
    """A linear layer on standardized tokens, on the encoder's device."""

    classes: NDArray[np.uint8]
    """[C] labels, ascending."""
    mean: Tensor
    """float32 [D]"""
    std: Tensor
    """float32 [D], infinite where a dimension is constant."""
    layer: Tensor
    """float32 [D + 1, C]"""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] -> logits [T, C]."""
        return scale(tokens, self.mean, self.std, self.layer.device, ones=1) @ self.layer


def _patches(tokens: Tokens, train: LabelledMaps) -> tuple[NDArray[np.uint8], Tensor]:
    """Return the labels in some images of `train` [C], ascending, and the pixels of each in each patch [T, C]."""
    counted = [
        _counted(map_of(train, row), grid)
        for row, grid in zip(tokens.image_ids.tolist(), tokens.grids.tolist(), strict=True)
    ]
    classes = np.unique(np.concatenate([own for own, _ in counted]))
    _need_labels(len(classes), train)
    counts = torch.zeros(len(tokens.values), len(classes))
    for (own, of_image), part in zip(counted, counts.split(tokens.lengths.tolist()), strict=True):
        part[:, np.searchsorted(classes, own)] = of_image
    return classes, counts


def _fitted(
    tokens: Tokens, classes: NDArray[np.uint8], counts: Tensor, rng: np.random.Generator, device: torch.device
) -> _Probe:
    """Fit the probe on patches and their labels; `rng` draws the images that choose its strength."""
    mean, std = moments(tokens.values)
    rows = counts.sum(dim=1).nonzero()[:, 0]
    image_of = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.lengths)[rows]
    image_of = image_of.unique(return_inverse=True)[1]  # counting only those that have a label somewhere
    targets = (counts[rows] / counts[rows].sum(dim=1, keepdim=True)).to(device)
    place = roomiest(device, 4 * len(rows) * (len(mean) + 1))
    x = scale(tokens.values[rows], mean, std, place, ones=1)
    images = int(image_of.max()) + 1
    # Even of fewer than five images one is held out, or there would be nothing to choose by.
    held_out = torch.from_numpy(rng.permutation(images) % 5 == min(4, max(1, images - 1)))[image_of]
    fitted, held_out = ((~held_out).nonzero()[:, 0].to(device), held_out.nonzero()[:, 0].to(device))
    layers = softmax_regression(x, targets, STRENGTHS, rows=fitted)
    shown = x[held_out.to(place)].to(device)
    losses = torch.stack([F.cross_entropy(shown @ layer, targets[held_out]) for layer in layers])
    best = int(losses.argmin())
    (layer,) = softmax_regression(x, targets, STRENGTHS[best : best + 1], layers[best])
    return _Probe(classes, mean, std, layer)


def _counted(labels: NDArray[np.uint8], grid: tuple[int, int]) -> tuple[NDArray[np.uint8], Tensor]:
    """Return the labels of an image, ascending, and how many pixels of each lie in each patch, see `patch_labels`."""
    own = np.unique(labels)
    own = own[own != IGNORED]
    return own, patch_labels(labels, grid, own)


def pixel_counts(probe: _Probe | PatchNeighbors, tokens: Tokens, val: LabelledMaps) -> NDArray[np.int32]:
    """Count the pixels of each class in each image, without ignored ones: correct, labeled, predicted, [N, 3, 256]."""
    areas = np.zeros((len(tokens.lengths), 3, LABELS), dtype=np.int32)
    views = tokens.values.split(tokens.lengths.tolist())
    for own, row, grid, view in zip(areas, tokens.image_ids.tolist(), tokens.grids.tolist(), views, strict=True):
        labels = map_of(val, row)
        predicted = probe.classes[predict(probe(view).T.view(-1, *grid), labels.shape)]
        labels, predicted = labels[labels != IGNORED], predicted[labels != IGNORED]
        for counts, pixels in zip(own, (labels[labels == predicted], labels, predicted), strict=True):
            counts[:] = np.bincount(pixels, minlength=LABELS)
    return areas


def predict(logits: Tensor, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the class of each pixel, [h, w], from the logits of patches, [C, rows, columns], interpolated bilinearly.

    Logits of all pixels at once can take gigabytes, so they are made in bands of `linear.BLOCK`.
    """
    height, width = size
    rows = torch.eye(logits.shape[1], device=logits.device)
    weights = F.interpolate(rows[None], size=height, mode="linear", align_corners=False)[0]  # [rows, h]
    bands = []
    for band in weights.split(rows_at_once(len(logits) * width), dim=1):
        lines = torch.einsum("crk,rh->chk", logits, band)
        shape = lines.shape[1], width
        bands.append(
            F.interpolate(lines[None], size=shape, mode="bilinear", align_corners=False)[0].argmax(dim=0).cpu()
        )
    return torch.cat(bands).numpy()


def _need_same_labels(train: LabelledMaps, val: LabelledMaps) -> None:
    """Raise SourceError if `val` has no label, or one that `train` lacks; read maps of `train` until all are found."""
    first: dict[int, int] = {}
    for row in val.catalog.rows.tolist():
        first |= dict.fromkeys(_labels_in(val, row) - first.keys(), row)
    _need_labels(len(first), val)
    found: set[int] = set()
    for row in train.catalog.rows.tolist():
        if first.keys() <= found:
            return
        found |= _labels_in(train, row)
    _need_labels(len(found), train)
    for label in first.keys() - found:
        raise SourceError(
            f"The label map of {val.source.key(first[label])} in {val.source.name} contains the label {label}, which "
            f"does not occur in {train.source.name}. Add images with that label, or set its pixels to {IGNORED} to "
            "ignore them."
        )


def _labels_in(maps: LabelledMaps, row: int) -> set[int]:
    return {*np.unique(map_of(maps, row)).tolist()} - {IGNORED}


def _need_labels(labels: int, maps: LabelledMaps) -> None:
    if not labels:
        raise SourceError(
            f"The label maps of {maps.source.name} have no labels: every pixel is {IGNORED}, which is ignored."
        )


def patch_labels(labels: NDArray[np.uint8], grid: tuple[int, int], classes: NDArray[np.uint8]) -> Tensor:
    """Count the pixels of each class in each patch: float32 [rows * columns, C].

    A pixel belongs to the patch that its center lies in.

    Args:
        labels: [h, w]; only those in `classes` [C], ascending, count.
        grid: rows and columns of patches.
        classes: the labels of the columns.
    """
    (height, width), (rows, cols) = labels.shape, grid
    row, col = (((2 * np.arange(n) + 1) * parts) // (2 * n) for n, parts in ((height, rows), (width, cols)))
    patch = row[:, None] * cols + col
    counted = np.isin(labels, classes)
    places = patch[counted] * len(classes) + np.searchsorted(classes, labels[counted])
    counts = np.bincount(places, minlength=rows * cols * len(classes)).reshape(rows * cols, len(classes))
    return torch.from_numpy(counts).float()


def mean_iou(areas: NDArray[np.number]) -> NDArray[np.float64]:
    """Return the mean over classes of intersection over union, without classes that are neither there nor predicted.

    Args:
        areas: [..., 3, C] pixels of each class: correct, labeled, predicted. At least one pixel is labeled.
    """
    both, labeled, predicted = np.moveaxis(areas, -2, 0)
    union = labeled + predicted - both
    return (both / np.maximum(union, 1)).sum(axis=-1) / (union > 0).sum(axis=-1)


def bootstrap(areas: NDArray[np.int32], rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95% confidence interval of `mean_iou` over the choice of images, from `RESAMPLES` bootstrap samples.

    It is the basic interval (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 5.2), cut off
    at 0 and 1. A sample lacks some rare classes, which biases its score; the basic interval corrects that, and the
    percentile interval would double it.

    Args:
        areas: [N, 3, C] of each image, see `mean_iou`.
        rng: draws the images.
    """
    labeled = areas[areas[:, 1].any(axis=1)]  # the others add nothing, and a sample of only such images has no score
    images = len(labeled)
    times = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES).astype(float)  # [RESAMPLES, images]
    samples = mean_iou((times @ labeled.reshape(images, -1).astype(float)).reshape(RESAMPLES, *areas.shape[1:]))
    low, high = 2 * mean_iou(areas.sum(axis=0)) - np.quantile(samples, (0.975, 0.025))
    return max(float(low), 0.0), min(float(high), 1.0)
