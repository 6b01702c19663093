"""Files of rows: Parquet, NumPy or CSV. Each is whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijepa_enhanced.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = ("label", "error")
"""Columns with few different values."""


def write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write a Parquet file, each table as one row group."""
    import pyarrow.parquet as pq

    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=list(TEXTS)) as writer,
    ):
        for table in tables:
            writer.write_table(table)


def write_npy(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write PART.COLUMN.npy [rows, D] for every column of features, and at last PART.csv with all other columns.

    The rows of images that cannot be decoded are NaN.
    """
    import pyarrow as pa
    import pyarrow.csv

    table = pa.concat_tables(tables)
    features = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    for name in features:
        with replacing(path.with_suffix(f".{name}.npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, _matrix(table[name]))
    with replacing(path) as temporary:
        pa.csv.write_csv(table.drop_columns(features), str(temporary))


def write_csv(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write a CSV file with one column for each number of a feature; those of unreadable images are empty."""
    import pyarrow as pa
    import pyarrow.csv

    flat = pa.schema([part for field in schema for part in _flattened(field)])
    with replacing(path) as temporary, pa.csv.CSVWriter(str(temporary), flat) as writer:
        for table in tables:
            columns: list[pa.ChunkedArray | pa.Array] = []
            for field in schema:
                column = table[field.name]
                if pa.types.is_fixed_size_list(field.type):
                    valid = column.is_valid().to_numpy()
                    columns += [pa.array(values, pa.float32(), mask=~valid) for values in _matrix(column).T]
                else:
                    columns.append(column)
            writer.write_table(pa.table(columns, schema=flat))


def _flattened(field: pa.Field) -> list[pa.Field]:
    import pyarrow as pa

    if not pa.types.is_fixed_size_list(field.type):
        return [field]
    return [pa.field(f"{field.name}_{number}", pa.float32()) for number in range(field.type.list_size)]


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of D numbers as [n, D]; NaN where a list is null."""
    parts = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy().reshape(-1, chunk.type.list_size)
        values = values[chunk.offset : chunk.offset + len(chunk)].copy()
        values[~chunk.is_valid().to_numpy(zero_copy_only=False)] = np.nan
        parts.append(values)
    return np.concatenate(parts)


Writer = Callable[[Iterable["pa.Table"], "pa.Schema", Path], None]
WRITERS: dict[str, tuple[str, Writer]] = {
    "parquet": (".parquet", write_parquet),
    "npy": (".csv", write_npy),
    "csv": (".csv", write_csv),
}
"""By format: the extension of the file that is written last, and the function that writes it."""


def count_errors(path: Path) -> int:
    """Return how many rows of a file, the one that is written last, are of images that cannot be decoded.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        errors = pq.read_table(path, columns=["error"])["error"]
    else:
        import pyarrow as pa
        import pyarrow.csv

        options = pa.csv.ConvertOptions(
            include_columns=["error"], column_types={"error": pa.string()}, strings_can_be_null=True
        )
        errors = pa.csv.read_csv(str(path), convert_options=options)["error"]
    return len(errors) - errors.null_count
