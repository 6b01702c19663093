"""The plan: which views of which images lie in which pack. Integer arithmetic on the catalog, no pixels.

A plan is a function of (seed, epoch, configuration, catalog), so every rank and every resumed run makes the same one.
Its unit is the pack: what one device sees at once. A step is `packs_per_step` packs, whatever the number of
ranks; packs form an endless sequence over epochs, and a step may straddle two of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.config import LOCAL_SCALE, DataConfig
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.packing import balance, cut_into_packs
from ijepa_enhanced.errors import PlanError
from ijepa_enhanced.masks import MIN_TOKENS
from ijepa_enhanced.randomness import Purpose, generator, permuted

LOCAL_CROP = 0.05
"""Smallest area of a local view's crop; DINO's, in its code."""
MIN_IMAGES = 2
"""One image has no other to differ from: its variance is nothing."""


BLOCK = 1 << 18
"""Most views that are planned at once. Larger epochs are planned in blocks, so that a plan takes little memory: about
50 MB in each process (docs/scaling.md)."""


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
    """[V] position of each view's image in the catalog."""
    views: NDArray[np.int64]
    """[V] number of the view among its image's."""
    boxes: NDArray[np.float32]
    """[V, 4] top, left, height, width of the crop in pixels of the upright image."""
    grids: NDArray[np.int64]
    """[V, 2] rows and columns of patches."""
    unmasked: NDArray[np.bool_]
    """[V] whether the view is not masked; these follow the masked ones of their image, the local ones last."""

    def select(self, views: NDArray[np.integer | np.bool_] | slice) -> Pack:
        """Some of its views."""
        chosen = {name: values[views] for name, values in vars(self).items() if name != "cursor"}
        return dataclasses.replace(self, **chosen)


@dataclass(frozen=True)
class EpochPlan:
    """All packs of one epoch, or of a block of it."""

    epoch: int
    images: NDArray[np.int64]
    """[N] position in the catalog of every image of the epoch, those of a pack side by side."""
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
    first: int = 0
    """Number of packs of the epoch that come before these."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Pack:
        chosen = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        images, views = self.images[chosen], self.grids.shape[1]
        return Pack(
            Cursor(self.epoch, self.first + number),
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


class Outline(NamedTuple):
    """Size of an epoch, without the plan of its packs."""

    packs: int
    tokens: int
    longest: tuple[int, int]
    """Most rows and most columns of a view."""
    too_small: int
    """`too_small` and `limited` are explained in `EpochPlan`."""
    limited: int


class Plan:
    """The endless sequence of packs of a training run.

    Args:
        catalog: the images.
        config: how they become packs.
        patch_size: P.
        seed: of everything drawn.
    """

    def __init__(self, catalog: Catalog, config: DataConfig, patch_size: int, seed: int) -> None:
        self.catalog = catalog
        self.config = config
        self.patch_size = patch_size
        self.seed = seed

    @property
    def hash(self) -> str:
        """What the sequence of packs depends on, as a SHA-256: equal hashes, equal plans."""
        # A float may be given as an integer, which JSON writes in another way.
        floats = [field.name for field in dataclasses.fields(self.config) if field.type == "float"]
        settings = dataclasses.asdict(self.config)
        settings |= {name: float(settings[name]) for name in floats}
        for free in ("source", "channels", "max_unreadable", "workers", "cache"):
            del settings[free]
        settings |= {"patch_size": self.patch_size, "seed": self.seed, "catalog": self.catalog.hash}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def views(self) -> int:
        """Views of an image."""
        return self.config.masked_views + self.config.global_views + self.config.local_views

    @property
    def blocks(self) -> int:
        """Number of blocks that an epoch is planned in. It is 1 if the epoch has at most `BLOCK` views."""
        return max(1, -(-len(self.catalog.heights) * self.views // BLOCK))

    def epoch(self, epoch: int) -> EpochPlan:
        """Return all packs of one epoch, in memory. Errors as for `block`."""
        blocks = [self.block(epoch, number) for number in range(self.blocks)]
        if len(blocks) == 1:
            return blocks[0]
        sizes = np.concatenate([np.diff(block.offsets) for block in blocks])
        return dataclasses.replace(
            blocks[0],
            images=np.concatenate([block.images for block in blocks]),
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            boxes=np.concatenate([block.boxes for block in blocks]),
            grids=np.concatenate([block.grids for block in blocks]),
            too_small=sum(block.too_small for block in blocks),
            limited=sum(block.limited for block in blocks),
        )

    @cached_property
    def outline(self) -> Outline:
        """Outline of the first epoch. With several blocks, it is estimated from the first one. Errors as for
        `block`."""
        block, blocks = self.block(0, 0), self.blocks
        rows, cols = block.grids.max(axis=(0, 1)).tolist()
        tokens = int(block.pack_tokens.sum())
        return Outline(
            blocks * len(block), blocks * tokens, (rows, cols), blocks * block.too_small, blocks * block.limited
        )

    def _images_of(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Return the positions in the catalog of the images of a block, ascending. Several blocks share the images at
        random."""
        count = len(self.catalog.heights)
        start, stop = (count * place // self.blocks for place in (number, number + 1))
        places = np.arange(start, stop)
        if self.blocks == 1:
            return places
        # This draw uses another view number than `block`, so that the two draws are independent.
        return np.sort(permuted(places, count, generator(self.seed, Purpose.ORDER, epoch, view=1)))

    def block(self, epoch: int, block: int, first: int = 0) -> EpochPlan:
        """Return the packs of one of the `blocks` of an epoch.

        Args:
            epoch: from 0.
            block: from 0.
            first: packs of the epoch before this block.

        Raises:
            PlanError: fewer than `MIN_IMAGES` images are large enough to train on.
        """
        config, candidates = self.config, self._images_of(epoch, block)
        image_heights, image_widths = (
            values[candidates, None] for values in (self.catalog.heights, self.catalog.widths)
        )
        number = np.arange(self.views)
        masked, local = number < config.masked_views, number >= config.masked_views + config.global_views
        rng = generator(self.seed, Purpose.GEOMETRY, epoch, block)
        draws = rng.random((4, len(candidates), len(number)), dtype=np.float32)
        smallest = np.where(local, min(LOCAL_CROP, config.min_crop), config.min_crop)
        largest = np.where(local, config.min_crop, config.max_crop)
        crop = np.sqrt(smallest + (largest - smallest) * draws[0])
        heights = np.maximum(1, image_heights * crop)
        widths = np.maximum(1, image_widths * crop)
        tops = (image_heights - heights) * draws[1]
        lefts = (image_widths - widths) * draws[2]
        resolution = None
        wanted = heights * widths
        if config.min_resolution is not None and config.max_resolution is not None:
            resolution = (
                config.min_resolution + (config.max_resolution - config.min_resolution) * draws[3]
            ) / np.where(local, LOCAL_SCALE, 1)
            wanted = resolution**2
        limit = np.where(local, config.local_limit, config.view_limit)
        grids = fit_grids(heights, widths, resolution, self.patch_size, limit)
        enough = (grids.prod(axis=2) >= MIN_TOKENS)[:, masked].all(axis=1)
        shown = np.ones_like(enough)
        if self.catalog.shares is not None:
            shown = generator(self.seed, Purpose.MIX, epoch, block).random(len(shown)) < self.catalog.shares[candidates]
        if (enough & shown).sum() < MIN_IMAGES:
            large, images, side = (enough & shown).sum(), shown.sum(), self.patch_size
            found, more = f"there {'is' if images == 1 else 'are'} only {images}", ""
            if large < images:
                found = f"only {large} of {images} images {'is' if large == 1 else 'are'} large enough"
                more = " or raise data.min_resolution"
            raise PlanError(
                f"Training needs at least {MIN_IMAGES} images whose views have {MIN_TOKENS} or more patches of {side} "
                f"x {side} px, but {found}. Add images{more}."
            )
        images = np.flatnonzero(enough & shown)
        tokens = grids[images].prod(axis=2).sum(axis=1)
        packs = balance(tokens, config.tokens_per_pack, generator(self.seed, Purpose.ORDER, epoch, block))
        images = images[np.argsort(packs, kind="stable")]
        boxes = np.stack([tops, lefts, heights, widths], axis=2).astype(np.float32)
        return EpochPlan(
            epoch,
            candidates[images],
            np.concatenate([[0], np.cumsum(np.bincount(packs))]),
            boxes[images],
            grids[images],
            config.masked_views,
            config.tokens_per_pack,
            too_small=int((~enough & shown).sum()),
            limited=int((wanted[images] / self.patch_size**2 > limit).sum()),
            first=first,
        )

    def share(self, world: int) -> int:
        """Packs of a step that each of `world` ranks takes.

        Raises:
            PlanError: they cannot share them evenly.
        """
        share, rest = divmod(self.config.packs_per_step, world)
        if rest:
            raise PlanError(
                f"data.packs_per_step ({self.config.packs_per_step}) must be a multiple of the number of processes "
                f"({world}), for example {world}."
            )
        return share

    def packs(self, cursor: Cursor, rank: int = 0, world: int = 1) -> Iterator[Pack]:
        """The packs of one rank from `cursor`, the first pack of a step, on, without end.

        In each step of `packs_per_step` packs, rank r gets pack r, pack r + world and so on. While the packs of a block
        are used, a thread plans the next block.

        Raises:
            PlanError: see `share`.
        """
        self.share(world)
        number = 0
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.block, cursor.epoch, 0)
            for turn in itertools.count(cursor.epoch * self.blocks):
                epoch, block = divmod(turn, self.blocks)
                plan = coming.result()
                after = plan.first + len(plan)
                if block + 1 < self.blocks:
                    coming = thread.submit(self.block, epoch, block + 1, after)
                else:
                    coming = thread.submit(self.block, epoch + 1, 0)
                start = cursor.pack - plan.first if epoch == cursor.epoch else 0
                for pack in range(max(0, start), len(plan)):
                    if number % world == rank:
                        yield plan[pack]
                    number = (number + 1) % self.config.packs_per_step


def inference_packs(catalog: Catalog, resolution: int | None, patch_size: int, limit: int, budget: int) -> list[Pack]:
    """Packs that show every image of the catalog once, whole, in order.

    Args:
        catalog: the images.
        resolution: sqrt(height * width) in pixels after resizing; None is native size.
        patch_size: P.
        limit: most tokens of a view.
        budget: most tokens of a pack, unless one view alone has more.
    """
    grids = fit_grids(catalog.heights, catalog.widths, resolution, patch_size, limit)
    zeros = np.zeros_like(catalog.heights)
    boxes = np.stack([zeros, zeros, catalog.heights, catalog.widths], axis=1).astype(np.float32)
    ends = [stop for _, stop in cut_into_packs(grids.prod(axis=1), budget)]
    images, offsets = np.arange(len(grids)), np.array([0, *ends])
    plan = EpochPlan(0, images, offsets, boxes[:, None], grids[:, None], 1, budget, too_small=0, limited=0)
    return [plan[number] for number in range(len(plan))]
