"""Tables of images: Parquet files and Hugging Face data sets, through the Arrow memory map of `datasets`.

`datasets` turns Parquet into Arrow files in its own cache folder (`$HF_DATASETS_CACHE`), once; any row of these is read
in microseconds, where a row of Parquet costs the decompression of its row group.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.listing import Listing, Texts
from ijepa_enhanced.data.sources.base import HEAD, FileSource, fingerprint_of
from ijepa_enhanced.data.sources.labels import label_array, number_labels
from ijepa_enhanced.data.sources.splits import choose_split
from ijepa_enhanced.errors import SourceError, UnreadableImage

Columns = Mapping[str, str]
"""The names of the `image` and `label` columns, and of the Hub's `config`, as far as the user gave them."""


class TableSource(FileSource):
    """The rows of a table.

    Images are the one column of type Image, of structs with a field `bytes`, or of bytes; labels are the one column of
    type ClassLabel, or else numbers, strings or booleans in a column `label`. If there are several, the column named
    `image` or `label` is used. `number_labels` says which rows have no label, and how names are numbered.

    Args:
        dataset: a `datasets.Dataset` of one row or more.
        name: what the user called it.
        columns: the columns that the user chose.
        files: name and number of rows of each file, for the keys; by default keys are the split and the row.

    Raises:
        SourceError: there is no image column, or several and none is chosen.
    """

    kind = "table"
    how_to_label = "Add #label=COLUMN to the source, with the name of the column of the labels."

    def __init__(
        self, dataset: Any, name: str, columns: Columns, files: Sequence[tuple[str, int]] | None = None
    ) -> None:
        self.name = name
        self.prefix = str(dataset.split or "row")
        self.files = [(self.prefix, len(dataset))] if files is None else files
        features: dict[str, Any] = dataset.features
        image = _column("image", [column for column in features if _holds_images(features[column])], columns, name)
        if image is None:
            listed = ", ".join(f"{column} ({_type(feature)})" for column, feature in features.items())
            raise SourceError(
                f"{name} has no image column (type Image or binary, or a struct whose field 'bytes' is binary). Its "
                f"columns are: {listed}."
            )
        named = [column for column, feature in features.items() if _type(feature) == "ClassLabel"]
        numbered = [column for column, feature in features.items() if _holds_labels(feature)]
        plain = ["label"] if "label" in numbered and "label" not in named else []
        label = _column("label", numbered if "label" in columns else named + plain, columns, name)
        self.columns = (image, label)
        self.images = dataset.select_columns([image]).with_format("arrow")
        self.written = None if label is None else dataset.select_columns([label]).with_format("arrow")
        self.class_names = None if label is None else getattr(features[label], "names", None)

    def make_listing(self) -> Listing:
        """See `Source`.

        Raises:
            SourceError: a label has no name, or is a number that int64 cannot hold.
        """
        keys = Texts.of(f"{name}:{row}" for name, count in self.files for row in range(count))
        if self.written is None:
            return Listing(keys)
        written = self.written[:][self.columns[1]].to_pylist()
        return Listing(keys, *_labels(written, self.class_names, self.name))

    def _open(self, row: int) -> BinaryIO:
        import pyarrow as pa

        buffer, path = self._cell(row)
        if buffer is not None:
            return cast(BinaryIO, pa.BufferReader(buffer))
        if path is None:
            raise UnreadableImage("no image in this row")
        return open(path, "rb", buffering=HEAD)

    def _length(self, row: int) -> int:
        buffer, path = self._cell(row)
        return buffer.size if buffer is not None else os.stat(path).st_size if path is not None else 0

    def _cell(self, row: int) -> tuple[Any, str | None]:
        """Return the bytes of an image in Arrow's memory, or None, and the path of its file, or None."""
        cell = self.images[row].column(0)[0]
        data = cell["bytes"] if cell.is_valid and not hasattr(cell, "as_buffer") else cell
        if data.is_valid:
            return data.as_buffer(), None
        return None, (cell.as_py() or {}).get("path")

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        names = (name or "" for name in self.columns)
        return ("table", self.split or self.prefix, *names, *(file["filename"] for file in self.images.cache_files))

    def fingerprint(self) -> str:
        """See `Source`; it knows size, time and some bytes of the files that `datasets` maps."""
        files = [Path(file["filename"]) for file in self.images.cache_files]
        # Slices of a split lie in the same files.
        split = self.split or self.prefix
        return fingerprint_of((f"{file.name}\0{split}\0{self.columns}", file) for file in files)


def open_parquet(files: Sequence[Path], name: str, columns: Columns) -> TableSource:
    """The rows of Parquet files, in the order of the files.

    Raises:
        SourceError: see `TableSource`; or a file cannot be read, their columns differ, there is no row, or `datasets`
            is not installed.
    """
    import pyarrow.parquet as pq

    datasets = _datasets()
    rows: list[tuple[str, int]] = []
    names: list[str] = []
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise SourceError(f"{file} is not a Parquet file, or is damaged.") from error
        own = sorted(metadata.schema.to_arrow_schema().names)
        names = names or own
        if own != names:
            raise SourceError(
                f"The files of {name} have different columns: {files[0].name} has {', '.join(names)}, but {file.name} "
                f"has {', '.join(own)}. Choose files with the same columns."
            )
        rows.append((file.name, metadata.num_rows))
    if not any(count for _, count in rows):
        raise SourceError(f"No images in {name}: it has no rows.")
    with _loading(name):
        # `datasets` reads names as patterns.
        dataset = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files])
    count = sum(count for _, count in rows)
    if len(dataset) != count:
        raise SourceError(
            f"{name} has {count} rows, but the `datasets` library loaded {len(dataset)}. Clear its cache, or rename "
            "the files so that their names have only letters, digits, '-' and '_'."
        )
    return TableSource(dataset, name, columns, rows)


def open_hub(name: str, part: str, columns: Columns) -> TableSource:
    """A data set of the Hub, or a folder laid out like one: `hf://NAME` or `hf://NAME:SPLIT`.

    Args:
        name: with the split if `choose_split` cannot find it; it can be a slice, such as `train[:1000]`.
        part: see `choose_split`.
        columns: see `TableSource`; `config` is the configuration of a data set that has several.

    Raises:
        SourceError: see `TableSource`; or it cannot be loaded, or `datasets` is not installed.
    """
    datasets = _datasets()
    repository, _, split = name.removeprefix("hf://").partition(":")
    config = columns.get("config")
    if Path(repository).exists() and glob.escape(repository) != repository:
        raise SourceError(
            f"{name}: the `datasets` library reads the name of this folder as a pattern. Rename it, without *, ? and "
            "brackets."
        )
    with _loading(name):
        configs = datasets.get_dataset_config_names(repository)
    if config is None and len(configs) > 1:
        listed = ", ".join(configs)
        raise SourceError(
            f"{name} has several configurations: {listed}. Choose one, for example {name}#config={configs[0]}."
        )
    if not split:
        with _loading(name):
            splits = datasets.get_dataset_split_names(repository, config)
        split = choose_split(splits, part, name, f"{name}:")
    with _loading(name):
        dataset = datasets.load_dataset(repository, config, split=split, keep_in_memory=False)
    source = TableSource(dataset, name, columns)
    source.split = f"split {split}"
    return source


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any(Path(folder, name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: Path, name: str, part: str, columns: Columns) -> TableSource:
    """Return a data set that was saved with `save_to_disk`; if it has splits, the one of `choose_split`.

    Raises:
        SourceError: see `TableSource`; or it cannot be loaded, or `datasets` is not installed.
    """
    datasets = _datasets()
    with _loading(name):
        dataset = datasets.load_from_disk(str(folder), keep_in_memory=False)
    if not isinstance(dataset, datasets.DatasetDict):
        return TableSource(dataset, name, columns)
    split = choose_split(list(dataset), part, name, f"{name}/")
    source = TableSource(dataset[split], name, columns)
    source.split = f"split {split}"
    return source


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            "Parquet files and Hugging Face datasets can be read only with the `datasets` package. Install it with: "
            "pip install 'ijepa-enhanced[data]'"
        ) from error
    return datasets


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Makes a SourceError of what `datasets` raises."""
    try:
        yield
    except (OSError, ValueError, LookupError, _datasets().exceptions.DatasetsError) as error:
        first, *_ = [*str(error.__cause__ or error).splitlines(), type(error).__name__]
        raise SourceError(f"{name} cannot be loaded: {first.rstrip('.')}.") from error


def _column(kind: str, possible: list[str], columns: Columns, name: str) -> str | None:
    """The column of images or labels among those that can be it."""
    asked = columns.get(kind, kind)
    if asked in possible:
        return asked
    if kind in columns:
        found = f". Its {kind} columns are: {', '.join(possible)}" if possible else f", nor any other {kind} column"
        raise SourceError(f"{name} has no {kind} column '{asked}'{found}.")
    if len(possible) > 1:
        listed = ", ".join(possible)
        raise SourceError(
            f"{name} has several {kind} columns: {listed}. Choose one, for example {name}#{kind}={possible[0]}."
        )
    return possible[0] if possible else None


def _type(feature: Any) -> str:
    """A word for the type of a column."""
    if isinstance(feature, dict):
        return "struct"
    name = type(feature).__name__
    return str(feature.dtype) if name == "Value" else name


def _holds_images(feature: Any) -> bool:
    kinds = ("Image", "binary", "large_binary")
    return _type(feature) in kinds or (isinstance(feature, dict) and _type(feature.get("bytes")) in (*kinds, "null"))


def _holds_labels(feature: Any) -> bool:
    return _type(feature).startswith(("ClassLabel", "int", "uint", "float", "bool", "string", "large_string"))


def _labels(
    written: list[Any], classes: list[str] | None, name: str
) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    if classes is None:
        return number_labels(written, None, name)
    labels = label_array([-1 if label is None or label < 0 else label for label in written], name)
    if labels.max() >= len(classes):
        raise SourceError(
            f"{name} has the label {labels.max()}, but only {len(classes)} class names, for the labels 0 to "
            f"{len(classes) - 1}."
        )
    return (None, None) if (labels < 0).all() else (labels, classes)
