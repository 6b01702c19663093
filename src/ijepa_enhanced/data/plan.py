"""The plan: which views of which images lie in which pack. Integer arithmetic on the index, no pixels.

A plan is a function of (seed, epoch, configuration, index), so every rank and every resumed run makes the same one.
Its unit is the pack: what one device sees at once. A step is `packs_per_step` packs, whatever the number of
ranks; packs form an endless sequence over epochs, and a step may straddle two of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.index import Index
from ijepa_enhanced.masks import MIN_TOKENS
from ijepa_enhanced.randomness import Purpose, generator

FINE_ROUNDS = 16
"""Rounds of `balance` dealt by size. Its use at 1 to 64 rounds: docs/log.md."""

VIEW_SHARE = 8
"""A view may hold 1 / 8 of a pack by default: fewer, larger views leave the packer too little to balance with."""

LOCAL_SCALE = 2
"""How many times smaller the sides of local views are than of others; DINO has 224 / 96 (arXiv 2104.14294)."""
LOCAL_CROP = 0.05
"""Smallest area of a local view's crop; DINO's, in its code."""
MIN_IMAGES = 2
"""One image has no other to differ from: its variance is nothing."""


@dataclass(frozen=True)
class DataConfig:
    """The images and how they become packs."""

    source: str = "synthetic"
    """A folder of images, tar shards (`train-{000000..000002}.tar`), Parquet (`train-*.parquet`), `hf://NAME`, a list
    (`.csv`, `.jsonl`), or `synthetic`; or several with weights, `photos@2 + train-*.tar@1`; see docs/data.md."""
    tokens_per_pack: int = 16384
    """Most tokens that one device sees at once: what bounds memory."""
    packs_per_step: int = 1
    """Packs of one optimizer step, over all ranks and accumulated on each."""
    views: int = 1
    """Views drawn of each image; all of them lie in one pack."""
    whole_views: int = 0
    """Views drawn of each image besides, that are not masked: the student sees them whole, and the teacher never. They
    serve objective.invariance alone."""
    local_views: int = 0
    """Small whole views besides, from 5% of the image to `min_crop`, at half the side (multi-crop, SwAV, arXiv
    2006.09882, section 3.2)."""
    min_side: int | None = 112
    """Smallest sqrt(height * width) of a view in pixels, after resizing with its aspect ratio kept."""
    max_side: int | None = 224
    """Largest. The side is drawn uniformly: side, not area, as NaViT found (arXiv 2307.06304, section 3.2).
    Both null: the crop's native size, never enlarged."""
    min_crop: float = 0.3
    """Smallest area of the random crop, at the image's own aspect ratio, as a fraction of the image."""
    max_crop: float = 1.0
    """Largest. I-JEPA draws from 0.3 to 1 (arXiv 2301.08243, appendix A.1)."""
    max_view_tokens: int | None = None
    """Most tokens of a view; larger ones are scaled down. Null: tokens_per_pack / 8."""
    max_unreadable: float = 0.01
    """Fraction of the source's images that may be unreadable before the run stops."""
    workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""
    cache: Literal["none", "memory"] = "none"
    """Memory: all image files, or what `synthetic` draws, are read before training into memory that the workers share.
    It takes their bytes (`synthetic`: 241 MB), and is refused when they do not fit."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_pack", "packs_per_step", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("whole_views", "local_views"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be at least 0, not {getattr(self, name)}.")
        if self.max_view_tokens is not None and self.max_view_tokens < 1:
            raise ValueError(f"data.max_view_tokens must be null or at least 1, not {self.max_view_tokens}.")
        if self.workers < 0:
            raise ValueError(f"data.workers must be at least 0, not {self.workers}.")
        if (self.min_side is None) != (self.max_side is None):
            raise ValueError("data.min_side and data.max_side must both be numbers, or both null for native size.")
        if self.min_side is not None and self.max_side is not None and not 1 <= self.min_side <= self.max_side:
            raise ValueError(
                "data.min_side and data.max_side must satisfy 1 <= min <= max, "
                f"not {self.min_side} and {self.max_side}."
            )
        if not 0.0 < self.min_crop <= self.max_crop <= 1.0:
            raise ValueError(
                "data.min_crop and data.max_crop must satisfy 0 < min <= max <= 1, "
                f"not {self.min_crop} and {self.max_crop}."
            )
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise ValueError(f"data.max_unreadable must lie between 0 and 1, not {self.max_unreadable}.")
        large = self.views + self.whole_views
        if self.view_limit * large + self.local_limit * self.local_views > self.tokens_per_pack:
            local = f", {self.local_views} of up to {self.local_limit}" if self.local_views else ""
            raise ValueError(
                f"data.tokens_per_pack ({self.tokens_per_pack}) cannot hold the views of one image "
                f"({large} of up to {self.view_limit} tokens{local}). Raise it, or lower data.max_view_tokens."
            )
        if self.view_limit < MIN_TOKENS:
            raise ValueError(
                f"Views of at most {self.view_limit} tokens cannot be masked: {MIN_TOKENS} are needed. "
                "Raise data.tokens_per_pack or data.max_view_tokens."
            )

    @property
    def view_limit(self) -> int:
        """Most tokens of a view."""
        return self.max_view_tokens or self.tokens_per_pack // VIEW_SHARE

    @property
    def local_limit(self) -> int:
        """Most tokens of a local view."""
        return max(1, self.view_limit // LOCAL_SCALE**2)


def fit_grids(
    heights: NDArray[np.number],
    widths: NDArray[np.number],
    side: NDArray[np.floating] | float | None,
    patch_size: int,
    limit: NDArray[np.integer] | int,
) -> NDArray[np.int64]:
    """The patch grid of each view: int64 [..., 2] rows and columns, at least 1 x 1 and at most `limit` tokens.

    Args:
        heights, widths: [...] pixels of what is shown.
        side: sqrt(height * width) after resizing, [...] or one for all; None is native size.
        patch_size: P.
        limit: most tokens of a view, [...] or one for all.

    When one axis is clamped to a single patch the other is recomputed from the area: otherwise 1 x 4000 px
    at side 224 would have 885 tokens of 16 px instead of 196.
    """
    area = heights * widths if side is None else np.broadcast_to(np.square(side), heights.shape)
    tokens = np.minimum(area / patch_size**2, limit)
    aspect = heights / widths
    rows = np.rint(np.sqrt(tokens * aspect))
    cols = np.rint(np.sqrt(tokens / aspect))
    line = np.maximum(1, np.rint(tokens))
    rows, cols = (
        np.where(rows == 0, 1, np.where(cols == 0, line, rows)),
        np.where(cols == 0, 1, np.where(rows == 0, line, cols)),
    )
    # Rounding both axes up can step over the limit; the longer axis gives way, which bends the shape least.
    over = rows * cols > limit
    tall = rows >= cols
    rows, cols = (
        np.where(over & tall, limit // cols, rows),
        np.where(over & ~tall, limit // rows, cols),
    )
    return np.stack([rows, cols], axis=-1).astype(np.int64)


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
        raise ValueError(f"An image of {tokens.max()} tokens does not fit a pack of {budget}.")
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


class PlanError(ValueError):
    """No plan can be made; the message says why and what to do."""


class Cursor(NamedTuple):
    """The next pack to be trained on."""

    epoch: int
    pack: int


@dataclass(frozen=True)
class Pack:
    """What a worker needs to make one batch; V views, those of one image side by side."""

    cursor: Cursor
    """Which pack of which epoch it is."""
    images: NDArray[np.int64]
    """[V] position of each view's image in the index."""
    views: NDArray[np.int64]
    """[V] number of the view among its image's."""
    boxes: NDArray[np.float32]
    """[V, 4] top, left, height, width of the crop in pixels of the upright image."""
    grids: NDArray[np.int64]
    """[V, 2] rows and columns of patches."""
    whole: NDArray[np.bool_]
    """[V] whether the student sees it whole; these follow the masked ones of their image, the local ones last."""

    def select(self, views: NDArray[np.integer | np.bool_] | slice) -> Pack:
        """Some of its views."""
        chosen = {name: values[views] for name, values in vars(self).items() if name != "cursor"}
        return dataclasses.replace(self, **chosen)


@dataclass(frozen=True)
class EpochPlan:
    """All packs of one epoch."""

    epoch: int
    images: NDArray[np.int64]
    """[N] position in the index of every image of the epoch, those of a pack side by side."""
    offsets: NDArray[np.int64]
    """[packs + 1]: pack p is images offsets[p] to offsets[p + 1]."""
    boxes: NDArray[np.float32]
    """[N, views, 4]"""
    grids: NDArray[np.int64]
    """[N, views, 2]"""
    masked: int
    """How many of an image's views are masked."""
    budget: int
    """Most tokens of a pack."""
    too_small: int
    """Images left out of this epoch because a view of theirs has fewer tokens than a mask needs."""
    limited: int
    """Views scaled down to the limit of tokens a view."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Pack:
        chosen = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        images, views = self.images[chosen], self.grids.shape[1]
        return Pack(
            Cursor(self.epoch, number),
            np.repeat(images, views),
            np.tile(np.arange(views), len(images)),
            self.boxes[chosen].reshape(-1, 4),
            self.grids[chosen].reshape(-1, 2),
            np.tile(np.arange(views) >= self.masked, len(images)),
        )

    @property
    def pack_tokens(self) -> NDArray[np.int64]:
        """Tokens of each pack: int64 [packs]."""
        return np.add.reduceat(self.grids.prod(axis=2).sum(axis=1), self.offsets[:-1])

    @property
    def budget_use(self) -> float:
        """Mean over maximum tokens of the packs: what ranks that wait for each other do not lose."""
        return float(self.pack_tokens.mean() / self.pack_tokens.max())

    @property
    def fill(self) -> float:
        """Mean tokens of a pack over `budget`."""
        return float(self.pack_tokens.mean() / self.budget)

    @property
    def fill_ceiling(self) -> float:
        """The highest `fill` that this many tokens allow in a whole number of packs."""
        total = int(self.pack_tokens.sum())
        return total / (-(-total // self.budget) * self.budget)


class Plan:
    """The endless sequence of packs of a training run.

    Args:
        index: the images.
        config: how they become packs.
        patch_size: P.
        seed: of everything drawn.
    """

    def __init__(self, index: Index, config: DataConfig, patch_size: int, seed: int) -> None:
        self.index = index
        self.config = config
        self.patch_size = patch_size
        self.seed = seed

    @property
    def hash(self) -> str:
        """What the sequence of packs depends on, as a SHA-256: equal hashes, equal plans."""
        settings = dataclasses.asdict(self.config)
        for free in ("source", "max_unreadable", "workers", "cache"):
            del settings[free]
        settings |= {"patch_size": self.patch_size, "seed": self.seed, "index": self.index.hash}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def epoch(self, epoch: int) -> EpochPlan:
        """The packs of one epoch.

        Raises:
            PlanError: fewer than `MIN_IMAGES` images are large enough to train on.
        """
        config, index = self.config, self.index
        number = np.arange(config.views + config.whole_views + config.local_views)
        masked, local = number < config.views, number >= config.views + config.whole_views
        rng = generator(self.seed, Purpose.GEOMETRY, epoch)
        draws = rng.random((4, len(index.heights), len(number)), dtype=np.float32)
        smallest = np.where(local, min(LOCAL_CROP, config.min_crop), config.min_crop)
        largest = np.where(local, config.min_crop, config.max_crop)
        crop = np.sqrt(smallest + (largest - smallest) * draws[0])
        heights = np.maximum(1, index.heights[:, None] * crop)
        widths = np.maximum(1, index.widths[:, None] * crop)
        tops = (index.heights[:, None] - heights) * draws[1]
        lefts = (index.widths[:, None] - widths) * draws[2]
        side = None
        wanted = heights * widths
        if config.min_side is not None and config.max_side is not None:
            side = (config.min_side + (config.max_side - config.min_side) * draws[3]) / np.where(local, LOCAL_SCALE, 1)
            wanted = side**2
        limit = np.where(local, config.local_limit, config.view_limit)
        grids = fit_grids(heights, widths, side, self.patch_size, limit)
        enough = (grids.prod(axis=2) >= MIN_TOKENS)[:, masked].all(axis=1)
        shown = np.ones_like(enough)
        if index.shares is not None:
            shown = generator(self.seed, Purpose.MIX, epoch).random(len(shown)) < index.shares
        if (enough & shown).sum() < MIN_IMAGES:
            raise PlanError(
                f"Training needs at least {MIN_IMAGES} images whose views have {MIN_TOKENS} patches of "
                f"{self.patch_size} px or more, and {(enough & shown).sum()} of {shown.sum()} have. Add images, raise "
                "data.min_side, or take a smaller encoder.patch_size."
            )
        images = np.flatnonzero(enough & shown)
        tokens = grids[images].prod(axis=2).sum(axis=1)
        packs = balance(tokens, config.tokens_per_pack, generator(self.seed, Purpose.ORDER, epoch))
        images = images[np.argsort(packs, kind="stable")]
        boxes = np.stack([tops, lefts, heights, widths], axis=2).astype(np.float32)
        return EpochPlan(
            epoch,
            images,
            np.concatenate([[0], np.cumsum(np.bincount(packs))]),
            boxes[images],
            grids[images],
            config.views,
            config.tokens_per_pack,
            too_small=int((~enough & shown).sum()),
            limited=int((wanted[images] / self.patch_size**2 > limit).sum()),
        )

    def share(self, world: int) -> int:
        """Packs of a step that each of `world` ranks takes.

        Raises:
            PlanError: they cannot share them evenly.
        """
        share, rest = divmod(self.config.packs_per_step, world)
        if rest:
            raise PlanError(
                f"data.packs_per_step ({self.config.packs_per_step}) must be a multiple of the {world} processes."
            )
        return share

    def packs(self, cursor: Cursor, rank: int = 0, world: int = 1) -> Iterator[Pack]:
        """The packs of one rank from `cursor`, the first pack of a step, on, without end.

        Of each step's `packs_per_step` packs, rank r takes the r-th, the (r + world)-th and so on.

        Raises:
            PlanError: see `share`.
        """
        self.share(world)
        epoch, first = cursor
        number = 0
        while True:
            plan = self.epoch(epoch)
            for pack in range(first, len(plan)):
                if number % world == rank:
                    yield plan[pack]
                number = (number + 1) % self.config.packs_per_step
            epoch, first = epoch + 1, 0


def inference_packs(index: Index, side: int | None, patch_size: int, limit: int, budget: int) -> list[Pack]:
    """Packs that show every image of the index once, whole, in order.

    Args:
        index: the images.
        side: sqrt(height * width) in pixels after resizing; None is native size.
        patch_size: P.
        limit: most tokens of a view.
        budget: most tokens of a pack, unless one view alone has more.
    """
    grids = fit_grids(index.heights, index.widths, side, patch_size, limit)
    zeros = np.zeros_like(index.heights)
    boxes = np.stack([zeros, zeros, index.heights, index.widths], axis=1).astype(np.float32)
    ends = [stop for _, stop in cut_into_packs(grids.prod(axis=1), budget)]
    images, offsets = np.arange(len(grids)), np.array([0, *ends])
    plan = EpochPlan(0, images, offsets, boxes[:, None], grids[:, None], 1, budget, too_small=0, limited=0)
    return [plan[number] for number in range(len(plan))]
