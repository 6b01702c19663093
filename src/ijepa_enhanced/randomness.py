"""Counter-based random numbers, keyed by what they are drawn for and not by what was drawn before.

So every worker, rank and resumed run draws the same numbers for the same image.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
"""Rounds of `permuted`. Four make a permutation that cannot be told from a random one if the round function is random
(Luby and Rackoff, 1988); ours is simpler, so there are two more."""


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


def permuted(places: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return where a random permutation of 0 to `count` - 1 moves some of these numbers. It needs no table of all
    numbers.

    The permutation is a Feistel network on the smallest even number of bits that hold `count`. Its round function is
    the finalizer of SplitMix64 (Steele et al., OOPSLA 2014). Numbers that leave the range go through the network again,
    see Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002).

    Args:
        places: the numbers, int64 [n].
        count: how many numbers the permutation moves.
        rng: draws the permutation.
    """
    bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    keys = rng.integers(0, 2**64, ROUNDS, dtype=np.uint64)

    def network(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> bits, values & mask
        for key in keys:
            mixed = right + key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            left, right = right, left ^ ((mixed >> np.uint64(31)) & mask)
        return (left << bits) | right

    moved = network(places.astype(np.uint64))
    while (outside := moved >= count).any():
        moved[outside] = network(moved[outside])
    return moved.astype(np.int64)


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
