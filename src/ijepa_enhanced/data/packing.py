"""Dealing views into packs: pure integer arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FINE_ROUNDS = 16
"""Rounds of `balance` dealt by size. Its use at 1 to 64 rounds: docs/log.md."""


def cut_into_packs(tokens: NDArray[np.integer], budget: int) -> list[tuple[int, int]]:
    """Cut a sequence of views into runs [start, stop) of at most `budget` tokens; a longer view runs alone."""
    runs: list[tuple[int, int]] = []
    start = used = 0
    for view, count in enumerate(tokens.tolist()):
        if view > start and used + count > budget:
            runs.append((start, view))
            start, used = view, 0
        used += count
    if len(tokens):
        runs.append((start, len(tokens)))
    return runs


def balance(tokens: NDArray[np.int64], budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal N images of `tokens` into packs of nearly equal size, none above `budget`: the pack of each, int64 [N].

    The number of packs is ceil(total / budget), or a little more when images that large leave no such division.
    Images are shuffled and dealt in rounds of one image a pack, the largest of a round to the emptiest pack. The
    last rounds are dealt from large to small over all of them, so that the smallest images even out the rest.

    Raises:
        ValueError: an image alone is above `budget`.
    """
    if tokens.max(initial=0) > budget:
        raise ValueError(f"An image of {tokens.max()} tokens does not fit into a pack of {budget} tokens.")
    count = -(-int(tokens.sum()) // budget)
    while True:
        order = rng.permutation(len(tokens))
        fine = min(len(tokens), FINE_ROUNDS * count)
        tail = order[len(tokens) - fine :]
        order[len(tokens) - fine :] = tail[np.argsort(-tokens[tail], kind="stable")]
        sums = np.zeros(count, dtype=np.int64)
        packs = np.empty(len(tokens), dtype=np.int64)
        # The round that may be short comes first, where later ones can still make up for it.
        start, stop = 0, len(tokens) % count or min(count, len(tokens))
        while start < len(tokens):
            images = order[start:stop]
            images = images[np.argsort(-tokens[images], kind="stable")]
            emptiest = np.argsort(sums, kind="stable")[: len(images)]
            packs[images] = emptiest
            sums[emptiest] += tokens[images]
            start, stop = stop, stop + count
        if sums.max(initial=0) <= budget:
            return rng.permutation(count)[packs]
        count += 1 + count // 1000
