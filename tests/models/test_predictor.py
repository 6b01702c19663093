"""The predictor answers for every hidden token, in the order of the targets."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.loader import masked
from ijepa_enhanced.masks import ViewMasks
from ijepa_enhanced.models.config import PredictorConfig
from ijepa_enhanced.models.predictor import Predictor
from ijepa_enhanced.packed import Packed, Segments, Selection

WIDTH = 24


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(PredictorConfig(width=32, depth=2, heads=2), WIDTH, WIDTH, (8, 8))


def streams(batch: MaskedBatch) -> tuple[Packed, Packed]:
    return batch.packed.select(batch.context), batch.packed.select(batch.targets)


def test_answers_come_in_the_order_of_the_targets_of_the_batch() -> None:
    """A head that reads back the positions shows for which token each answer is."""
    grids = np.array([[2, 3], [3, 2]])
    packed = Packed.of_grids(np.zeros((12, 4), np.uint8), grids)
    masks = [
        ViewMasks(np.array([0, 1]), (np.array([4, 5]), np.array([2, 5]))),
        ViewMasks(np.array([3]), (np.array([0]), np.array([1, 5]))),
    ]
    batch = masked(Batch(packed, torch.arange(2), None, (0, 0), ()), masks)
    assert batch.targets.index.tolist() == [2, 4, 5, 6, 7, 11]
    assert batch.targets.segments.lengths == (3, 3)
    silent = Predictor(PredictorConfig(width=32, depth=1, heads=2), WIDTH, WIDTH, (8, 8))
    with torch.no_grad():
        for layer in silent.layers:
            for part in (layer.proj, layer.fc2):
                part.weight.zero_()
        silent.mask_token.zero_()
        answers = silent(torch.randn(3, WIDTH), *streams(batch))
        tables = silent.positions.rows, silent.positions.cols
        expected = [
            silent.head(silent.norm(tables[0][row] + tables[1][col]))
            for row, col in packed.positions[batch.targets.index].tolist()
        ]
    # One rounding of float32 apiece, of numbers about 1.
    torch.testing.assert_close(answers, torch.stack(expected), rtol=0, atol=1e-6)


def test_an_answer_depends_on_its_own_view_alone(predictor: Predictor, make_batch: Callable[..., MaskedBatch]) -> None:
    batch = make_batch([(4, 5), (6, 3), (3, 3)], 0)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(batch.context.segments.total, WIDTH, generator=generator)
    start, stop = batch.context.segments.cu_seqlens[1:3].tolist()
    changed = context.clone()
    changed[start:stop] += 1
    with torch.no_grad():
        before, after = predictor(context, *streams(batch)), predictor(changed, *streams(batch))
    moved = (before != after).any(dim=1)
    first, last = batch.packed.segments.cu_seqlens[1:3].tolist()
    of_the_view = (batch.targets.index >= first) & (batch.targets.index < last)
    assert torch.equal(moved, of_the_view)


def test_an_answer_does_not_depend_on_what_else_is_asked(
    predictor: Predictor, make_batch: Callable[..., MaskedBatch]
) -> None:
    batch = make_batch([(6, 6)], 2)
    context = torch.randn(batch.context.segments.total, WIDTH, generator=torch.Generator().manual_seed(0))
    seen, hidden = streams(batch)
    with torch.no_grad():
        together = predictor(context, seen, hidden)
        for token, expected in zip(batch.targets.index, together, strict=True):
            alone = batch.packed.select(Selection(token[None], Segments.of([1])))
            found = predictor(context, seen, alone)
            # Another number of rows in a matrix product: float32 rounding, as in test_packing_invariance.py.
            assert (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize(
    ("width", "depth", "heads", "message"),
    [
        (32, 0, 2, "predictor.depth must be at least 1, not 0."),
        (32, 1, 0, "predictor.heads must be at least 1, not 0."),
        *(
            (width, 1, heads, f"predictor.width must be a positive multiple of {multiple}, not {width}.")
            for width, heads, multiple in (
                (32, 5, "40 (8 * predictor.heads)"),
                (0, 1, "8 (8 * predictor.heads)"),
                (-16, 2, "16 (8 * predictor.heads)"),
                (6, 2, "16 (8 * predictor.heads)"),
                (36, 3, "24 (8 * predictor.heads)"),
            )
        ),
    ],
)
def test_a_wrong_size_is_an_error(width: int, depth: int, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        PredictorConfig(width, depth, heads)
    assert str(error.value) == message
