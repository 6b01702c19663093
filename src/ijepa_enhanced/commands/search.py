"""`ijepa search`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor

from ijepa_enhanced.commands.options import SearchOptions
from ijepa_enhanced.commands.setup import check_files, counting_bars, print_json, print_table
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.embed.folder import EmbeddingFolder, unit_vectors
from ijepa_enhanced.embed.index import SearchIndex
from ijepa_enhanced.embed.search import Report, duplicates, nearest
from ijepa_enhanced.embed.settings import hash_encoder
from ijepa_enhanced.embed.sheet import QUERY, Pictures, query_tile
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError, RequestError, UnreadableImage
from ijepa_enhanced.visualize.tiles import EARLIER, Tile, draw_sheet

logger = logging.getLogger(__name__)

SHEET = "_search.png"
"""Readers of Parquet folders ignore names that start with an underscore."""
EXACT_ROWS = 1_000_000
"""Folders of more rows than this are searched with an index."""
COUNT = 10
"""Default number of matches."""
THRESHOLD = 0.998
"""Default cosine of near-duplicates. For an encoder of 300 steps it finds all images that were compressed or resized,
91% of flipped ones and 29% of those cropped by 5%; the nearest other image has a cosine this high for 0.3% of images
(docs/log.md, 2026-11-28)."""
LINES, TILES, PAIRS = 20, 10, 60
"""Most queries on a contact sheet, most matches of each, and most pairs of near-duplicates."""
PRECISIONS: dict[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "bfloat16": "bf16"}
"""Names of `Encoder.embed` for those in the settings."""

Results = list[dict[str, Any]]
Lines = list[list[Tile]]


def run(options: SearchOptions) -> int:
    """Search a folder of embeddings, and draw what is found.

    Raises:
        UserError: the request is wrong, or the folder cannot be read.
    """
    if Path(options.folder).is_file():
        raise RequestError(f"{options.folder} is a file. The first argument is the folder that `ijepa embed` wrote.")
    check_files(options.queries)
    folder = EmbeddingFolder.open(Path(options.folder))
    if len(folder.files) < folder.settings.files:
        logger.warning(
            "Searching %d of %d files. The others do not exist yet.", len(folder.files), folder.settings.files
        )
    pictures = Pictures(folder.settings)
    results, lines = (find_duplicates if options.duplicates else find_matches)(options, folder, pictures)
    if lines:
        sheet = folder.path / SHEET if options.out is None else Path(options.out)
        try:
            draw_sheet(lines, sheet, side_by_side=options.duplicates)
            pictures.report()
            print(sheet)
        except OSError as error:  # the folder may be read-only, and the matches are found
            logger.warning("%s cannot be written: %s. Use --out FILE.", sheet, error.strerror or error)
    print_json(options, {"matches": results})
    return 0


def find_matches(options: SearchOptions, folder: EmbeddingFolder, pictures: Pictures) -> tuple[Results, Lines]:
    """Print the matches of each query, and return them with the lines of the contact sheet."""
    keys = folder.find(options.key) if options.key else []
    names = [*options.queries, *options.key]
    parts = [embedded(options, folder)] if options.queries else []
    parts += [folder.vectors(keys)] if keys else []
    vectors, own = torch.cat(parts), torch.tensor([-1] * len(options.queries) + keys)
    count = COUNT if options.count is None else options.count
    index = opened_index(options, folder)
    if index is None:
        with counting("Searching", folder) as report:
            found = nearest(vectors, own, folder.blocks(), count, best_device(), report)
    else:
        found = index.nearest(vectors, own, count)
    rows = folder.rows([*keys, *(match.row for matches in found for match in matches)])
    results: Results = []
    several = len(names) > 1
    table = Table(*([folded("query")] if several else []), "score", folded("key"), "label")
    for name, matches in zip(names, found, strict=True):
        for match in matches:
            row = rows[match.row]
            results.append({"query": name, "key": row.key, "path": row.path, "label": row.label, "score": match.score})
            table.add_row(*([name] if several else []), f"{match.score:.4f}", row.key, row.label)
        table.add_section()
    print_table(table)
    log_limit("queries", LINES, len(names))
    log_limit("matches of each query", TILES, max(map(len, found)))
    lines = []
    for name, row, matches in list(zip(names, own.tolist(), found, strict=True))[:LINES]:
        query = query_tile(name) if row < 0 else pictures.of_row(rows[row], QUERY, framed=True)
        lines.append([query, *(pictures.of_row(rows[each.row], f"{each.score:.4f}") for each in matches[:TILES])])
    return results, lines


def find_duplicates(options: SearchOptions, folder: EmbeddingFolder, pictures: Pictures) -> tuple[Results, Lines]:
    """Print near-duplicates, and return them with the lines of the contact sheet."""
    threshold = THRESHOLD if options.threshold is None else options.threshold
    index = opened_index(options, folder)
    with counting("Comparing", folder) as report:
        if index is None:
            found = duplicates(folder, threshold, best_device(), report)
        else:
            found = index.duplicates(threshold, report)
    rows = folder.rows(row for each in found for row in (each.row, each.of))
    results: Results = []
    for each in found:
        row, of = rows[each.row], rows[each.of]
        results.append({"key": row.key, "path": row.path, "duplicate_of": of.key, "score": each.score})
    # The least similar pairs show best whether the threshold is too low, so some of all are shown.
    shown = [found[place] for place in np.linspace(0, len(found) - 1, min(PAIRS, len(found))).round().astype(int)]
    table = Table(folded("key"), folded("duplicate of"), "score")
    lines = []
    for each in shown:
        row, of = rows[each.row], rows[each.of]
        table.add_row(row.key, of.key, f"{each.score:.4f}")
        lines.append([pictures.of_row(of, EARLIER, framed=True), pictures.of_row(row, f"{each.score:.4f}")])
    if found:
        print_table(table)
    print(
        f"{len(found):,} of {folder.images:,} images have an earlier near-duplicate (cosine of at least {threshold})."
    )
    if len(found) > PAIRS:
        logger.info("Showing %d of %d pairs, from the most to the least similar. --json lists all.", PAIRS, len(found))
    return results, lines


def embedded(options: SearchOptions, folder: EmbeddingFolder) -> Tensor:
    """Return the features of the query images as the folder would store them: float32 [Q, D], each of length 1.

    Raises:
        RequestError: the encoder is not there, or is another one; or a query cannot be embedded.
    """
    settings, images = folder.settings, options.queries
    weights = settings.encoder if options.weights is None else options.weights
    try:
        encoder = Encoder.from_pretrained(weights).to(best_device())
    except EncoderError as error:
        if options.weights is not None:
            raise
        raise RequestError(
            f"{error} {folder.path} was made with this encoder. Use --weights if it has moved."
        ) from error
    if hash_encoder(encoder) != settings.encoder_hash:
        was = "it has changed" if options.weights is None else settings.encoder
        raise RequestError(
            f"{folder.path} contains embeddings of another encoder than {weights} ({was}). Use --weights with the "
            "encoder that made them, or run `ijepa embed` with this one and another output folder."
        )
    try:
        features = encoder.embed(
            images, settings.resolution or "native", settings.merge_rate, PRECISIONS[settings.precision]
        )
    except UnreadableImage as error:
        raise RequestError(f"{error}. A query must be an image file.") from error
    vectors, wrong = unit_vectors(features.to(getattr(torch, settings.dtype)).float().cpu().numpy())
    if len(wrong):
        raise RequestError(f"The embedding of {images[wrong[0]]} is zero or not finite, so it cannot be compared.")
    return vectors


def opened_index(options: SearchOptions, folder: EmbeddingFolder) -> SearchIndex | None:
    """Return the index of a folder if it is asked for or the folder is large."""
    if not options.index and folder.images <= EXACT_ROWS:
        return None
    with counting("Building an index", folder) as report:
        return SearchIndex(folder, report)


@contextmanager
def counting(title: str, folder: EmbeddingFolder) -> Iterator[Report]:
    """Show a bar on stderr if that is a terminal, and yield what to call with numbers of rows that are done."""
    with counting_bars() as bar:
        task = bar.add_task(title, total=folder.images)
        yield lambda rows: bar.update(task, advance=rows)


def folded(title: str) -> Column:
    """Return a column of names, which are broken instead of cut off."""
    return Column(title, overflow="fold")


def log_limit(what: str, most: int, there: int) -> None:
    """Log that the contact sheet does not show everything."""
    if there > most:
        logger.info("The contact sheet shows only the first %d of %d %s.", most, there, what)
