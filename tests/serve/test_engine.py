"""Concurrent requests share packs and get what `Encoder.embed` gives; the queue is bounded; nothing is lost."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import ImageTooLarge, RequestError, UnreadableImage
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.serve.config import Limits
from ijepa_enhanced.serve.engine import BadImage, Engine, How, Overloaded, decode
from ijepa_enhanced.serve.pack import run_pack
from ijepa_enhanced.serve.packer import Packaged, Packer, PackReport, Waiting
from ijepa_enhanced.visualize.merges import regions

BOUND = 2e-6
"""Norm of a difference by the norm, as in tests/test_packing_invariance.py, which says why."""

MakeImage = Callable[..., bytes]
LONG = 3600.0
"""Seconds that no test waits: only a full pack or closing starts a pack."""


def distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def submit(packer: Packer, image: bytes, **how: Any) -> Future[Packaged]:
    decoded, _ = decode(image, 10**6, 48, 8, 1000)
    return packer.submit(decoded, **how)


@pytest.fixture
def reports() -> list[PackReport]:
    return []


@pytest.fixture
def patient(encoder: Encoder, reports: list[PackReport]) -> Iterator[Packer]:
    """A packer that waits for full packs of 100 patches: two images of 5 x 7 patches are not enough, three are."""
    packer = Packer(encoder, 100, LONG, reports.append)
    yield packer
    packer.close()


@pytest.fixture
def engine(encoder: Encoder) -> Iterator[Engine]:
    engine = Engine(encoder, Limits(queue=40, max_pixels=100_000, tokens_per_pack=200))
    yield engine
    engine.close()


def test_images_of_all_sizes_share_packs_and_get_their_own_features(
    encoder: Encoder, make_image: MakeImage, reports: list[PackReport]
) -> None:
    images = [make_image(20 + 7 * number, 90 - 6 * number, number) for number in range(11)]
    rates = [0.1 if number % 3 == 0 else 0.0 for number in range(11)]
    packer = Packer(encoder, 150, LONG, reports.append)
    futures = [submit(packer, image, merge_rate=rate) for image, rate in zip(images, rates, strict=True)]
    packer.close()
    for image, rate, future in zip(images, rates, futures, strict=True):
        (alone,) = encoder.embed([image], merge_rate=rate).numpy()
        assert distance(future.result().output.vector, alone) < BOUND
    assert sum(report.images for report in reports) == 11
    assert max(report.images for report in reports) > 2
    assert all(report.tokens <= 150 for report in reports)


def test_a_pack_starts_when_it_is_full(patient: Packer, make_image: MakeImage, reports: list[PackReport]) -> None:
    first, second = submit(patient, make_image()), submit(patient, make_image(seed=1))
    third = submit(patient, make_image(seed=2))  # does not fit, so the first two go
    assert first.result(10).pack == second.result(10).pack == reports[0]
    assert reports[0].images == 2
    assert not third.done()


def test_a_smaller_image_takes_the_room_that_a_larger_one_leaves(
    encoder: Encoder, make_image: MakeImage, reports: list[PackReport]
) -> None:
    packer = Packer(encoder, 50, LONG)
    large, larger, small = (decode(make_image(*size), 10**6, None, 8, 1000)[0] for size in ((40, 56), (48, 56), (8, 8)))
    futures = [packer.submit(image) for image in (large, larger, small)]
    packer.close()
    assert [future.result().pack.images for future in futures] == [2, 1, 2]


def test_an_idle_encoder_waits_no_longer_than_allowed(encoder: Encoder, make_image: MakeImage) -> None:
    packer = Packer(encoder, 10**6, 0.05)
    waited = submit(packer, make_image()).result(10).waited
    packer.close()
    assert waited >= 0.05


def test_images_of_different_merge_rates_never_share_a_pack(patient: Packer, make_image: MakeImage) -> None:
    futures = [submit(patient, make_image(8, 8), merge_rate=rate) for rate in (0.0, 0.1, 0.0, 0.1)]
    patient.close()
    assert [future.result().pack.images for future in futures] == [2, 2, 2, 2]
    assert len({id(future.result().pack) for future in futures}) == 2


def test_a_cancelled_image_leaves_its_place(patient: Packer, make_image: MakeImage, reports: list[PackReport]) -> None:
    kept, left = submit(patient, make_image()), submit(patient, make_image(seed=1))
    assert left.cancel()
    patient.close()
    assert kept.result().pack.images == 1
    assert [report.images for report in reports] == [1]


def test_an_image_that_is_cancelled_while_its_pack_is_chosen_leaves_it(
    encoder: Encoder, make_image: MakeImage, reports: list[PackReport]
) -> None:
    class Late(Packer):
        """Its first image is cancelled at the last moment."""

        def choose(self, waiting: Sequence[Waiting]) -> tuple[list[Waiting], bool]:
            chosen, full = super().choose(waiting)
            if full:
                chosen[0].future.cancel()
            return chosen, full

    packer = Late(encoder, 70, LONG, reports.append)
    left, kept = submit(packer, make_image()), submit(packer, make_image(seed=1))
    assert kept.result(10).pack.images == 1
    packer.close()
    assert left.cancelled()


def test_an_error_in_one_pack_ends_neither_the_thread_nor_other_packs(
    patient: Packer, encoder: Encoder, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(of: Encoder, packed: Any, merge_rate: float, mapped: Any) -> Any:
        if merge_rate:
            raise RuntimeError("out of memory")
        return run_pack(of, packed, merge_rate, mapped)

    monkeypatch.setattr("ijepa_enhanced.serve.packer.run_pack", failing)
    bad, good = submit(patient, make_image(), merge_rate=0.1), submit(patient, make_image())
    patient.close()
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(10)
    assert good.result(10).output.vector.shape == (encoder.width,)


def test_a_closed_packer_finishes_what_it_has_and_takes_no_more(patient: Packer, make_image: MakeImage) -> None:
    waiting = submit(patient, make_image())
    patient.close()
    assert waiting.done()
    with pytest.raises(RuntimeError, match="closed"):
        submit(patient, make_image())


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_maps_are_those_of_the_encoder_also_in_the_middle_of_a_pack(
    encoder: Encoder, make_image: MakeImage, rate: float
) -> None:
    images = [make_image(30 + 9 * number, 70 - 8 * number, number) for number in range(4)]
    packer = Packer(encoder, 10**6, LONG)
    futures = [submit(packer, image, merge_rate=rate, mapped=True) for image in images]
    packer.close()
    for image, future in zip(images, futures, strict=True):
        output = future.result().output
        assert output.maps is not None
        (expected,) = encoder.feature_maps([image], merge_rate=rate)
        assert distance(output.maps.features, expected.numpy()) < BOUND
        assert output.grid == expected.shape[:2]
        if rate:
            _, stages = regions(encoder, image, None, rate)
            assert np.array_equal(output.maps.regions, np.stack(stages))
            assert output.tokens == (stages[0].size, *(int(stage.max()) + 1 for stage in stages))
        else:
            assert output.maps.regions.shape == (0, *output.grid)


def test_the_class_token_and_registers_are_in_no_map(make_image: MakeImage) -> None:
    architecture = Architecture(
        *(64, 2, 2, 128, 8),
        positions="table",
        position_grid=(6, 5),
        resampling="bicubic-antialias",
        class_token=True,
        registers=2,
        layer_scale=True,
    )
    encoder = Encoder.random(architecture, Preprocessing(48, pooling="cls"), 0)
    images = [make_image(30 + 9 * number, 70 - 8 * number, number) for number in range(3)]
    packer = Packer(encoder, 10**6, LONG)
    futures = [submit(packer, image, merge_rate=0.2, mapped=True) for image in images]
    packer.close()
    assert futures[0].result().pack.images == 3
    for image, future in zip(images, futures, strict=True):
        output = future.result().output
        assert output.maps is not None
        (vector,), (features,) = (compute([image], merge_rate=0.2) for compute in (encoder.embed, encoder.feature_maps))
        assert distance(output.vector, vector.numpy()) < BOUND
        assert distance(output.maps.features, features.numpy()) < BOUND
        last = output.maps.regions[-1]
        assert set(last.ravel().tolist()) == set(range(output.tokens[-1]))


def test_concurrent_requests_get_their_own_images_in_their_own_order(
    engine: Engine, encoder: Encoder, make_image: MakeImage
) -> None:
    requests = [
        [make_image(20 + 3 * place, 70 - 5 * turn, 10 * turn + place) for place in range(3)] for turn in range(8)
    ]

    async def all_of_them() -> list[list[Any]]:
        return await asyncio.gather(*(engine.embed(images, How()) for images in requests))

    answers = asyncio.run(all_of_them())
    for images, found in zip(requests, answers, strict=True):
        expected = encoder.embed(images).numpy()
        for answer, alone in zip(found, expected, strict=True):
            assert distance(answer.made.output.vector, alone) < BOUND
    assert engine.pending == 0


def test_a_full_queue_refuses_more_and_says_when_to_come_back(engine: Engine, make_image: MakeImage) -> None:
    async def crowd() -> list[Any]:
        return await asyncio.gather(
            *(engine.embed([make_image(seed=number)] * 8, How()) for number in range(7)), return_exceptions=True
        )

    answers = asyncio.run(crowd())
    assert [isinstance(answer, Overloaded) for answer in answers] == [False] * 5 + [True] * 2  # 40 have room
    assert all(1 <= answer.retry_after <= 60 for answer in answers[5:])
    assert engine.pending == 0


def test_one_bad_image_fails_its_request_alone(engine: Engine, make_image: MakeImage) -> None:
    async def two() -> list[Any]:
        requests = [make_image(), b"no image"], [make_image()]
        return await asyncio.gather(*(engine.embed(images, How()) for images in requests), return_exceptions=True)

    bad, good = asyncio.run(two())
    assert isinstance(bad, BadImage)
    assert str(bad) == "Image 1: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file."
    assert len(good) == 1
    assert engine.pending == 0


def test_a_large_image_is_refused_by_its_header(make_image: MakeImage) -> None:
    header = make_image(400, 300)[:100]  # no pixel can be decoded from it
    with pytest.raises(ImageTooLarge, match=r"^300 x 400 px is above the limit of 100,000 px$"):
        decode(header, 100_000, 48, 8, 200)
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        decode(header, 120_000, 48, 8, 200)


def test_an_image_never_has_more_tokens_than_a_pack(engine: Engine, make_image: MakeImage) -> None:
    (answer,) = asyncio.run(engine.embed([make_image(300, 310)], How("native")))
    assert np.prod(answer.made.output.grid) <= engine.budget == 200
    assert answer.made.output.grid == (14, 14)
    asyncio.run(engine.embed([make_image(300, 310)], How(14 * 8)))
    with pytest.raises(RequestError, match="resolution must be at most 112 px, not 113: an image may have 200 patches"):
        asyncio.run(engine.embed([make_image(300, 310)], How(113)))


def test_a_request_that_is_cancelled_is_not_computed(encoder: Encoder, make_image: MakeImage) -> None:
    reports: list[PackReport] = []
    engine = Engine(encoder, Limits(max_wait=1000 * LONG), reports.append)

    async def leave() -> None:
        task = asyncio.create_task(engine.embed([make_image()], How()))
        while not engine._packer.waiting:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert engine.pending == 0
    engine.close()
    assert reports == []


def test_no_place_in_the_queue_is_lost_when_clients_leave_at_any_time(engine: Engine, make_image: MakeImage) -> None:
    image = make_image()

    async def leave(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.embed([image] * 2, How()), seconds)

    async def crowd() -> None:
        await asyncio.gather(*(leave(number / 1000) for number in range(20)))

    asyncio.run(crowd())
    assert engine.pending == 0
    assert len(asyncio.run(engine.embed([image], How()))) == 1
    assert engine.alive


def test_computing_leaves_no_gradients(engine: Engine, make_image: MakeImage) -> None:
    before = torch.is_grad_enabled()
    asyncio.run(engine.embed([make_image()], How()))
    assert torch.is_grad_enabled() == before


def test_the_wait_is_counted_from_the_decoded_image(patient: Packer, make_image: MakeImage) -> None:
    start = time.perf_counter()
    future = submit(patient, make_image())
    patient.close()
    assert 0 <= future.result().waited <= time.perf_counter() - start
