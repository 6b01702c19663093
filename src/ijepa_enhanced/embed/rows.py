"""From the features of packs to rows: one for every image, also for those that cannot be decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.embed.settings import METADATA, EmbedSettings
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.packed import segment_ids

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_BYTES = 2**26
"""Bytes of features that are collected before they are written, as one row group of a Parquet file."""


class PackFeatures(NamedTuple):
    """The features of the n readable images of a pack, on the host."""

    rows: NDArray[np.int64]
    """[n] rows of the source, ascending."""
    vectors: NDArray[np.floating]
    """[n, L, D]: for each of the last L layers, the feature of each image."""
    unreadable: dict[int, str]
    """Row and reason of each image that cannot be decoded."""
    grids: NDArray[np.int32] | None = None
    """[n, 2] rows and columns of patches, if tokens are kept."""
    tokens: NDArray[np.float16] | None = None
    """[T, D] features of all patches, image after image, after the last LayerNorm."""


def features_of(
    batch: Batch, outputs: list[Tensor], settings: EmbedSettings, encoder: Encoder, source: Source
) -> PackFeatures:
    """Return what is stored of a pack.

    Args:
        batch: the pack, on the encoder's device.
        outputs: the features [T, D] of the last layers; empty if no image of the pack can be decoded.
        settings: what to store.
        encoder: pools the features.
        source: knows the names of the images.

    Raises:
        RequestError: a feature is too large for float16.
    """
    rows, unreadable = batch.image_ids.cpu().numpy(), dict(batch.unreadable)
    if not outputs:
        return PackFeatures(rows, np.empty((0, settings.layers, settings.width), settings.dtype), unreadable)
    pooled = torch.stack([encoder.pool(x, batch.packed) for x in outputs], dim=1)
    vectors = pooled.to(getattr(torch, settings.dtype))
    overflow = ~vectors.isfinite().flatten(1).all(dim=1)
    if overflow.any():
        key = source.key(int(rows[int(overflow.nonzero()[0])]))
        raise RequestError(f"The features of {key} are too large for float16. Use --dtype float32.")
    if not settings.tokens:
        return PackFeatures(rows, vectors.cpu().numpy(), unreadable)
    patches = batch.packed.patches
    tokens = outputs[-1][patches].to(torch.float16)
    overflow = ~tokens.isfinite().all(dim=1)
    if overflow.any():
        view = segment_ids(batch.packed.segments.cu_seqlens, len(patches))[patches][overflow][0]
        key = source.key(int(rows[int(view)]))
        raise RequestError(f"The features of patches of {key} are too large for float16. Remove --tokens.")
    grids = batch.packed.grids.to("cpu", torch.int32).numpy()
    return PackFeatures(rows, vectors.cpu().numpy(), unreadable, grids, tokens.cpu().numpy())


class RowTables:
    """Makes Arrow tables of rows.

    Args:
        settings: what is stored.
        source: the images, with their catalog attached.
        depth: layers of the encoder.
    """

    def __init__(self, settings: EmbedSettings, source: Source, depth: int) -> None:
        self.settings = settings
        self.source = source
        self.vectors = settings.vectors(depth)

    def schema(self) -> pa.Schema:
        """Return the columns, with the settings as metadata."""
        import pyarrow as pa

        number = pa.type_for_alias(self.settings.dtype)
        fields = [("key", pa.string()), ("path", pa.string()), ("label", pa.string())]
        fields += [("height", pa.int32()), ("width", pa.int32()), ("error", pa.string())]
        fields += [(name, pa.list_(number, self.settings.width)) for name in self.vectors]
        if self.settings.tokens:
            fields.append(("grid", pa.list_(pa.int32(), 2)))
            fields.append(("tokens", pa.list_(pa.list_(pa.float16(), self.settings.width))))
        return pa.schema(fields, metadata={METADATA: self.settings.to_json()})

    def tables(self, rows: range, packs: Iterable[PackFeatures]) -> Iterator[pa.Table]:
        """Yield the rows of a file, in order, a few packs at a time.

        Args:
            rows: of the file.
            packs: the features of its packs, in order.
        """
        waiting: list[PackFeatures] = []
        start, size = rows.start, 0
        for pack in packs:
            waiting.append(pack)
            size += pack.vectors.nbytes + (0 if pack.tokens is None else pack.tokens.nbytes)
            if size >= GROUP_BYTES:
                stop = max([*pack.rows.tolist(), *pack.unreadable]) + 1
                yield self._table(range(start, stop), waiting)
                waiting, start, size = [], stop, 0
        if start < rows.stop:
            yield self._table(range(start, rows.stop), waiting)

    def _table(self, rows: range, packs: list[PackFeatures]) -> pa.Table:
        """Return the rows of some packs, and those of the unreadable images between them."""
        import pyarrow as pa

        source, listing = self.source, self.source.listing
        assert listing.sizes is not None
        known = np.concatenate([np.empty(0, np.int64), *(pack.rows for pack in packs)])
        reasons = {row: reason for pack in packs for row, reason in pack.unreadable.items()}
        missing = np.isin(np.arange(rows.start, rows.stop), known, invert=True)
        for row in (np.flatnonzero(missing) + rows.start).tolist():
            reasons.setdefault(row, listing.sizes.reasons[row])
        sizes = [
            [int(value) or None for value in values[rows.start : rows.stop]]
            for values in (listing.sizes.heights, listing.sizes.widths)
        ]
        columns = [
            pa.array([valid_text(source.key(row)) for row in rows]),
            pa.array([valid_text(source.file_of(row)) for row in rows], pa.string()),
            pa.array([self._label(row) for row in rows], pa.string()),
            *(pa.array(values, pa.int32()) for values in sizes),
            pa.array([valid_text(reasons.get(row)) for row in rows], pa.string()),
        ]
        for layer in range(len(self.vectors)):
            values = np.zeros((len(rows), self.settings.width), self.settings.dtype)
            if packs:
                values[~missing] = np.concatenate([pack.vectors[:, layer] for pack in packs])
            columns.append(_fixed(values, missing))
        if self.settings.tokens:
            columns += self._tokens(missing, [pack for pack in packs if pack.tokens is not None])
        return pa.table(columns, schema=self.schema())

    def _label(self, row: int) -> str | None:
        """Return the name of an image's class, or its number if classes have no names; None without a label."""
        labels, classes = self.source.labels, self.source.classes
        if labels is None or labels[row] < 0:
            return None
        return valid_text(str(labels[row]) if classes is None else classes[labels[row]])

    def _tokens(self, missing: NDArray[np.bool_], packs: list[PackFeatures]) -> list[Any]:
        """Return the columns `grid` and `tokens`."""
        import pyarrow as pa

        grids = np.zeros((len(missing), 2), np.int32)
        grids[~missing] = np.concatenate([np.empty((0, 2), np.int32), *(pack.grids for pack in packs)])
        width = self.settings.width
        tokens = np.concatenate([np.empty((0, width), np.float16), *(pack.tokens for pack in packs)])
        ends = np.cumsum([0, *grids.prod(axis=1)], dtype=np.int32)
        inner = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), width)
        lists = pa.ListArray.from_arrays(ends, inner, mask=pa.array(missing))
        return [_fixed(grids, missing), lists]


def _fixed(values: NDArray[Any], missing: NDArray[np.bool_]) -> Any:
    """Return an array [n, k] as an Arrow array of lists of k numbers; null where a row is missing."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1], mask=pa.array(missing))


def valid_text(text: str | None) -> str | None:
    """Return a text that is valid Unicode: names of files may not be."""
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
