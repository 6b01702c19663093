"""What exact search and search an index cost, and what the index finds: `python -m ijepa_enhanced.benchmarks.search`.

The vectors are positions of random walks, sums of Gaussian steps. Like photographs sorted by folder, neighbors are
similar, which is harder for an index than independent vectors. They lie in a folder as `ijepa embed` writes it, so that
times include reading it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.embed.folder import EmbeddingFolder
from ijepa_enhanced.embed.index import SearchIndex
from ijepa_enhanced.embed.search import Match, nearest
from ijepa_enhanced.embed.settings import EmbedSettings, save_settings
from ijepa_enhanced.embed.writers import write_parquet
from ijepa_enhanced.evaluate.cost import peak_bytes

VECTORS, WIDTH = 200_000, 384
WALKS = (200, 1)
"""Numbers of walks that the vectors are positions of."""
QUERIES, COUNT = 500, 10

Result = TypeVar("Result")


def run(csv: bool = False) -> dict[str, Any]:
    """Print the table and return the smallest `recall` of the index."""
    rows: list[dict[str, Any]] = []
    for walks in WALKS:
        with tempfile.TemporaryDirectory() as place:
            write_walks(Path(place), walks)
            rows += measure(EmbeddingFolder.open(Path(place)), walks)
    print(f"{VECTORS:,} vectors [{WIDTH}]; the {COUNT} nearest of each of {QUERIES} of them, all at once and one alone")
    print_table(rows)
    if csv:
        print(write_csv("search", rows))
    return {"recall": min(row["recall"] for row in rows)}


def measure(folder: EmbeddingFolder, walks: int) -> list[dict[str, Any]]:
    """Return the rows of exact search and of search with an index.

    The memory of exact search is the peak of its tensors. That of the index is its file, which is in memory while it is
    built and mapped later.
    """
    device = best_device()
    own = torch.from_numpy(np.random.default_rng(1).choice(VECTORS, QUERIES, replace=False))
    queries = folder.vectors(own.tolist())
    building, index = timed(lambda: SearchIndex(folder, ignored))

    def exact(count: int) -> list[list[Match]]:
        return nearest(queries[:count], own[:count], folder.blocks(), COUNT, device, ignored)

    def indexed(count: int) -> list[list[Match]]:
        return SearchIndex(folder, ignored).nearest(queries[:count], own[:count], COUNT)

    memory = {"exact": peak_bytes(lambda: exact(QUERIES), device), "usearch": index.path.stat().st_size}
    truth, rows = exact(QUERIES), []
    for name, search, built in (("exact", exact, 0.0), ("usearch", indexed, building)):
        together, found = timed(lambda search=search: search(QUERIES))  # type: ignore[misc]
        alone, _ = timed(lambda search=search: search(1))  # type: ignore[misc]
        hits = sum(len(rows_of(these) & rows_of(those)) for these, those in zip(truth, found, strict=True))
        rows.append(
            {
                "walks": walks,
                "search": name,
                "recall": hits / (COUNT * QUERIES),
                "build_seconds": built,
                "seconds_of_all": together,
                "seconds_of_one": alone,
                "MB": memory[name] / 1e6,
            }
        )
    return rows


def write_walks(folder: Path, walks: int) -> None:
    """Write a folder of embeddings as `ijepa embed` does."""
    import pyarrow as pa

    settings = EmbedSettings(
        "none", "", "walks", "", VECTORS, WIDTH, None, 0.0, "float32", "float32", 1, False, "parquet"
    )
    save_settings(settings, folder)
    rng, steps = np.random.default_rng(0), VECTORS // walks
    position = np.zeros(WIDTH, np.float32)
    for file in range(settings.files):
        rows = settings.rows_of(file)
        values = rng.standard_normal((len(rows), WIDTH), np.float32)
        for place, row in enumerate(rows):
            if row % steps:
                values[place] += position
            position = values[place]
        columns = {
            "key": pa.array([str(row) for row in rows]),
            **{name: pa.nulls(len(rows), pa.string()) for name in ("path", "label", "error")},
            "embedding": pa.FixedSizeListArray.from_arrays(values.ravel(), WIDTH),
        }
        table = pa.table(columns)
        write_parquet([table], table.schema, folder / f"{settings.name_of(file)}.parquet")


def rows_of(matches: list[Match]) -> set[int]:
    """Return the rows of matches."""
    return {match.row for match in matches}


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def ignored(rows: int) -> None:
    """Report to nobody."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", action="store_true")
    run(**vars(parser.parse_args()))
