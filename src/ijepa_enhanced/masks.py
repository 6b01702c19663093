"""I-JEPA's multi-block masks (arXiv 2301.08243, section 3 and appendix A.1) on a grid of any aspect ratio.

Differences from the paper's code:

- Each block draws its own size. The paper's code draws one size for all targets of a batch and one for all contexts.
- Masks are never cut to a common length, because the stream is ragged.
- A block's aspect ratio is relative to that of the view, so a wide image gets wide blocks and a wide context.
- Scale and aspect ratio are drawn independently.
- Blocks reach every position, including the last row and column.
- Fixed rules make every draw valid. There is no rejection sampling, so drawing always terminates.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 4
"""A view of fewer tokens yields no training example: it cannot be split into a context and several targets."""


@dataclass(frozen=True)
class MaskConfig:
    """Settings of the masks. The defaults are I-JEPA's (arXiv 2301.08243, appendix A.1)."""

    targets: int = 4
    """Number of target blocks per masked view."""
    min_target_area: float = 0.15
    """Minimum area of a target block, as a fraction of the view."""
    max_target_area: float = 0.2
    """Maximum area of a target block, as a fraction of the view."""
    min_target_aspect: float = 0.75
    """Minimum aspect ratio (height / width) of a target block, relative to that of the view."""
    max_target_aspect: float = 1.5
    """Maximum aspect ratio (height / width) of a target block, relative to that of the view."""
    min_context_area: float = 0.85
    """Minimum area of the context block, as a fraction of the view, before the targets are removed from it."""
    max_context_area: float = 1.0
    """Maximum area of the context block, as a fraction of the view, before the targets are removed from it."""

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise ValueError(f"masks.targets must be at least 1, not {self.targets}.")
        for name, low, high, bound in (
            ("target_area", self.min_target_area, self.max_target_area, 1.0),
            ("target_aspect", self.min_target_aspect, self.max_target_aspect, float("inf")),
            ("context_area", self.min_context_area, self.max_context_area, 1.0),
        ):
            if not 0.0 < low <= high <= bound or high == float("inf"):
                limit = " and finite" if bound == float("inf") else f" and at most {bound:g}"
                raise ValueError(
                    f"masks.min_{name} ({low:g}) and masks.max_{name} ({high:g}) must be in ascending order, above "
                    f"0{limit}."
                )


@dataclass(frozen=True)
class ViewMasks:
    """The masks of one view, as ascending token numbers (row * columns + column)."""

    context: NDArray[np.int64]
    targets: tuple[NDArray[np.int64], ...]
    """One array for each target block; blocks may overlap."""

    @property
    def hidden(self) -> NDArray[np.int64]:
        """Return the tokens of all target blocks, each once."""
        return np.unique(np.concatenate(self.targets))


def block_shape(rows: int, cols: int, area: float, aspect: float) -> tuple[int, int]:
    """Return the height and width, in tokens, of a block.

    If one axis is clamped to the grid, or rounds to 0, the other axis is recomputed to keep the area.

    Args:
        rows, cols: of the view's grid.
        area: of the block, as a fraction of the grid.
        aspect: height / width of the block, relative to that of the grid.
    """
    height = min(rows, max(1, round(rows * (area * aspect) ** 0.5)))
    width = min(cols, max(1, round(area * rows * cols / height)))
    # Once more, since `width` may have been clamped to `cols`.
    height = min(rows, max(1, round(area * rows * cols / width)))
    return height, width


def draw_block(rows: int, cols: int, area: float, aspect: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a block at a uniformly random place: bool [rows, cols]. Every position that fits is equally likely."""
    height, width = block_shape(rows, cols, area, aspect)
    # With the endpoint, so that blocks reach the last row and column.
    top = rng.integers(0, rows - height, endpoint=True)
    left = rng.integers(0, cols - width, endpoint=True)
    block = np.zeros((rows, cols), dtype=np.bool_)
    block[top : top + height, left : left + width] = True
    return block


def draw_masks(rows: int, cols: int, config: MaskConfig, rng: np.random.Generator) -> ViewMasks:
    """Draw the target blocks and the context of a view of `rows` x `cols` tokens.

    The context is never empty. If the targets cover the context block, the context is every token outside the targets.
    If they cover the whole view, the last targets are dropped one by one. A single target that still covers the view
    keeps its first half.

    Raises:
        ValueError: the view has fewer than `MIN_TOKENS` tokens.
    """
    if rows * cols < MIN_TOKENS:
        raise ValueError(f"A view of {rows} x {cols} tokens is too small to mask. It needs at least {MIN_TOKENS}.")
    targets = []
    for _ in range(config.targets):
        area = rng.uniform(config.min_target_area, config.max_target_area)
        aspect = rng.uniform(config.min_target_aspect, config.max_target_aspect)
        targets.append(draw_block(rows, cols, area, aspect, rng))
    area = rng.uniform(config.min_context_area, config.max_context_area)
    # Targets are taken out of the context, or the student would see what it has to predict.
    context = draw_block(rows, cols, area, 1.0, rng) & ~np.any(targets, axis=0)
    if not context.any():
        # Drop targets until the rest leaves a part of the view free.
        while len(targets) > 1 and np.all(np.any(targets, axis=0)):
            targets.pop()
        if np.all(targets):
            targets[0].flat[rows * cols // 2 :] = False
        context = ~np.any(targets, axis=0)
    return ViewMasks(np.flatnonzero(context), tuple(np.flatnonzero(target) for target in targets))
