"""Counter-based random numbers, keyed by what they are drawn for and not by what was drawn before.

So every worker, rank and resumed run draws the same numbers for the same image.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a number is drawn for. Every recorded run depends on these values: never renumber them."""

    ORDER = 0
    GEOMETRY = 1
    MASKS = 2
    HOLDOUT = 3
    PROBE = 4
    LOWSHOT = 5
    PROTOCOL = 6
    AUGMENT = 7
    MIX = 8


def generator(seed: int, purpose: Purpose, epoch: int = 0, image: int = 0, view: int = 0) -> np.random.Generator:
    """Return the generator of a (seed, purpose, epoch, image, view): Philox 4x64-10 (Salmon et al., SC'11).

    Each such tuple has its own stream of 2**64 draws.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    # The lowest word counts the draws, so that streams never overlap.
    counter = np.array([0, view, image, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def view_draws(
    seed: int, purpose: Purpose, epoch: int, views: Iterable[tuple[int, int]], count: int
) -> NDArray[np.float64]:
    """Return the first `count` draws on [0, 1) of the generator of each view: float64 [V, count].

    One generator moves from counter to counter, which takes a fifth of the time of a new one for each view.

    Args:
        seed, purpose, epoch: as for `generator`.
        views: image and view of each of the V views.
        count: numbers of each view.
    """
    rng = generator(seed, purpose, epoch)
    state = rng.bit_generator.state
    drawn = []
    for image, view in views:
        state["state"]["counter"][1:3] = view, image
        rng.bit_generator.state = state
        drawn.append(rng.random(count))
    return np.array(drawn).reshape(-1, count)
