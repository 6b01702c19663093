"""Exact search by cosine similarity: the nearest images of queries, and near-duplicates, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijepa_enhanced.embed.folder import Block, EmbeddingFolder

SCALE = 2**20
"""Cosines are compared and reported as multiples of 1 / SCALE, about 1e-6. In float32, products of the same vectors may
differ by some 1e-7 with their place in a block. Rounded, nearly all are ties, and those of equal images are 1."""
ROWS = 2**32
"""More rows than this have no place in a rank."""
NOTHING = torch.iinfo(torch.int64).min
"""The rank of a pair that does not count."""

QUERIES = 1024
"""Queries that are compared with a block at once: 64 MiB of float32, and twice as much for ranks."""
CHUNK = 2**16
"""Rows that are compared with all earlier ones at once: 96 MiB of float32 if D = 384. Every file is read once for each
chunk that it is not behind."""

Report = Callable[[int], None]
"""Called with the number of rows that are done."""


class Match(NamedTuple):
    """An image of the folder that is similar to a query."""

    row: int
    score: float
    """Cosine similarity."""


class Duplicate(NamedTuple):
    """An image that is similar to an earlier one."""

    row: int
    of: int
    """The row of the most similar earlier image, the first one among equals."""
    score: float
    """Their cosine similarity."""


def nearest(
    queries: Tensor, own: Tensor, blocks: Iterable[Block], count: int, device: torch.device, report: Report
) -> list[list[Match]]:
    """Return the most similar images of each query, the best first; among equals, the smaller row comes first.

    Args:
        queries: float32 [Q, D], each of length 1.
        own: int64 [Q], the row of each query, which is left out of its matches; -1 if it is not in the folder.
        blocks: all images to search. Only one block is in memory at a time.
        count: most matches of a query.
        device: where to compute.
        report: see `Report`.
    """
    parts = list(zip(queries.to(device).split(QUERIES), own.to(device).split(QUERIES), strict=True))
    best = [torch.empty(len(part), 0, dtype=torch.int64, device=device) for part, _ in parts]
    for block in blocks:
        vectors, rows = block.vectors.to(device), torch.from_numpy(block.rows).to(device)
        for number, (part, left_out) in enumerate(parts):
            ranks = rank(part @ vectors.T, rows).masked_fill_(rows == left_out[:, None], NOTHING)
            both = torch.cat([best[number], top(ranks, count)], dim=1)
            best[number] = top(both, count)
        report(len(rows))
    return [matches(ranks) for part in best for ranks in part.cpu()]


def duplicates(folder: EmbeddingFolder, threshold: float, device: torch.device, report: Report) -> list[Duplicate]:
    """Return each image that is at least as similar as `threshold` to an earlier one, the most similar first."""
    least = threshold - 0.5 / SCALE  # rounds to the threshold
    found: list[Duplicate] = []
    for later in chunks(folder.blocks()):
        images, numbers = later.vectors.to(device), torch.from_numpy(later.rows).to(device)
        best = torch.full_like(numbers, NOTHING)
        for earlier in folder.blocks(files_up_to(folder, int(later.rows[-1]))):
            vectors, rows = earlier.vectors.to(device), torch.from_numpy(earlier.rows).to(device)
            for start in range(0, len(images), QUERIES):
                part = slice(start, start + QUERIES)
                cosines = images[part] @ vectors.T
                # Few pairs pass, so that ranks are made of these only.
                image, other = ((cosines >= least) & (rows < numbers[part, None])).nonzero().unbind(1)
                best[part].scatter_reduce_(0, image, rank(cosines[image, other], rows[other]), "amax")
        found += [
            Duplicate(row, *match)
            for row, ranks in zip(later.rows.tolist(), best[:, None].cpu(), strict=True)
            for match in matches(ranks)
        ]
        report(len(numbers))
    return sorted(found, key=lambda each: (-each.score, each.row))


def rank(cosines: Tensor, rows: Tensor) -> Tensor:
    """Return int64 numbers that are larger for larger cosines, and among equals for smaller rows.

    Args:
        cosines: [..., n], rounded to multiples of 1 / `SCALE`.
        rows: int64 [n].
    """
    return ((cosines * SCALE).round().long() << 32) + (ROWS - 1 - rows)


def matches(ranks: Tensor) -> list[Match]:
    """Return what ranks [n] on the host were made of, and leave out pairs that do not count."""
    return [Match(ROWS - 1 - each % ROWS, (each >> 32) / SCALE) for each in ranks.tolist() if each != NOTHING]


def top(ranks: Tensor, count: int) -> Tensor:
    """Return the `count` largest ranks of each query, descending, or all of them: [Q, n] -> [Q, k]."""
    return ranks.topk(min(count, ranks.shape[1]), dim=1).values


def files_up_to(folder: EmbeddingFolder, row: int) -> list[int]:
    """Return the files that hold rows up to this one."""
    return [file for file in folder.files if folder.settings.rows_of(file).start <= row]


def chunks(blocks: Iterable[Block]) -> Iterator[Block]:
    """Join blocks to ones of `CHUNK` rows or a few more, but the last."""
    waiting: list[Block] = []
    for block in blocks:
        waiting.append(block)
        if sum(len(each.rows) for each in waiting) >= CHUNK:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)


def joined(blocks: list[Block]) -> Block:
    """Return several blocks as one."""
    return Block(np.concatenate([each.rows for each in blocks]), torch.cat([each.vectors for each in blocks]))
