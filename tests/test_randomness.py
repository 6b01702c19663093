"""What is drawn depends on what it is for, never on what was drawn before."""

import numpy as np
import pytest

from ijepa_enhanced.randomness import Purpose, generator, permuted, view_draws

KEYS = [
    (seed, purpose, epoch, image, view)
    for seed in (0, 1, 2**64 - 1)
    for purpose in Purpose
    for epoch in (0, 1, 2)
    for image in (0, 1, 2)
    for view in (0, 1, 2)
]


def draws(*key: int) -> tuple[int, ...]:
    seed, purpose, epoch, image, view = key
    rng = generator(seed, Purpose(purpose), epoch, image, view)
    return tuple(rng.integers(0, 2**63, 4).tolist())


def test_purposes_are_never_renumbered() -> None:
    # Every recorded run depends on them: a new purpose takes the next number.
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "ORDER": 0,
        "GEOMETRY": 1,
        "MASKS": 2,
        "HOLDOUT": 3,
        "PROBE": 4,
        "LOWSHOT": 5,
        "PROTOCOL": 6,
        "AUGMENT": 7,
        "MIX": 8,
    }


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    forwards = [draws(*key) for key in KEYS]
    np.random.seed(3)  # noqa: NPY002  # nothing may read the global state
    generator(0, Purpose.MASKS).random(1000)
    backwards = [draws(*key) for key in reversed(KEYS)]
    assert forwards == backwards[::-1]


def test_every_argument_changes_the_numbers() -> None:
    # 4 x 63 bits agree by chance never; mixed-up arguments, as (image 1, view 2) and (2, 1), would agree at once.
    first = [draws(*key) for key in KEYS]
    assert len({number for numbers in first for number in numbers}) == 4 * len(KEYS)


def test_streams_are_apart_by_the_high_words_of_the_counter() -> None:
    state = generator(5, Purpose.MASKS, epoch=2, image=3, view=4).bit_generator.state["state"]
    assert state["key"].tolist() == [5, 2]
    # The lowest word counts the draws: the streams of two identities cannot meet before 2**64 of them.
    assert state["counter"].tolist() == [0, 4, 3, 2]


def test_the_numbers_are_those_of_every_recorded_run() -> None:
    rng = generator(7, Purpose.GEOMETRY, epoch=1, image=2, view=3)
    assert rng.bit_generator.random_raw(2).tolist() == [8161618937018428783, 6184959776655221185]


def test_the_draws_of_many_views_are_those_of_their_generators() -> None:
    views = [(0, 0), (2**63 - 1, 1), (4, 7), (4, 8)]
    found = view_draws(9, Purpose.AUGMENT, 3, views, 10)
    for numbers, (image, view) in zip(found, views, strict=True):
        rng = generator(9, Purpose.AUGMENT, 3, image, view)
        # In one go and bit by bit.
        assert numbers.tolist() == [*rng.random(5).tolist(), *rng.random(5).tolist()]
    assert view_draws(9, Purpose.AUGMENT, 3, [], 10).shape == (0, 10)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000, 1025, 4097])
def test_a_permutation_moves_every_number_somewhere_else(count: int) -> None:
    whole = permuted(np.arange(count), count, generator(0, Purpose.ORDER))
    assert sorted(whole.tolist()) == list(range(count))
    assert permuted(np.arange(count)[::3], count, generator(0, Purpose.ORDER)).tolist() == whole[::3].tolist()


def test_a_permutation_is_as_even_as_a_random_one() -> None:
    # How many of the first tenth come out in each tenth: 1,000 each, with a standard deviation below 30.
    count, blocks = 100_000, []
    for epoch in range(2):
        moved = permuted(np.arange(count), count, generator(0, Purpose.ORDER, epoch))
        blocks.append(moved[: count // 10])
        assert (abs(np.bincount(blocks[-1] // (count // 10)) - 1000) < 150).all()
        assert abs(np.corrcoef(np.arange(count), moved)[0, 1]) < 5 / count**0.5
    assert abs(len(set(blocks[0].tolist()) & set(blocks[1].tolist())) - 1000) < 150


@pytest.mark.parametrize("key", [(-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, -1, 0), (0, 0, 0, -1), (2**64, 0, 0, 0)])
def test_what_has_no_place_in_64_bits_is_an_error(key: tuple[int, int, int, int]) -> None:
    seed, epoch, image, view = key
    with pytest.raises(OverflowError):
        generator(seed, Purpose.ORDER, epoch, image, view)
