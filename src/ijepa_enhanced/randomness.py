"""Counter-based random numbers: what is drawn depends on what it is for, never on what was drawn before.

So any worker, rank or resumed run draws the same numbers for the same image.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a number is drawn for. Values are part of every recorded run: never renumber them."""

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
    """A generator of its own for every (seed, purpose, epoch, image, view): Philox 4x64-10 (Salmon et al., SC'11).

    The identity goes into the key and the high words of the counter, which leaves 2**64 draws to each stream.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, view, image, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
