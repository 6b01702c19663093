"""The original's method computes the same features as ours, token by token, and padding changes nothing."""

from collections.abc import Callable

import pytest
import torch

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.benchmarks.original import Original, Rows, encode, lay_out
from ijepa_enhanced.data.loader import masks_of
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.jepa import Losses
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer

GRIDS = [(5, 7), (12, 15), (3, 3), (9, 9), (16, 16), (2, 11)]
CONFIG = EncoderConfig("Ti", 8, depth=2).architecture


@pytest.fixture
def batch(make_batch: Callable[..., MaskedBatch]) -> MaskedBatch:
    return make_batch(GRIDS)


@pytest.fixture
def rows(batch: MaskedBatch) -> Rows:
    return lay_out(batch, masks_of(batch, MaskConfig(), 0), CONFIG)


def test_rows_hold_every_token_once(batch: MaskedBatch, rows: Rows) -> None:
    lengths = batch.packed.segments.lengths
    assert torch.bincount(rows.views[rows.views >= 0]).tolist() == list(lengths)
    assert rows.views.shape == (3, 256)
    assert sum(lengths) == 583


def test_rows_are_added_until_a_tenth_is_padding(make_batch: Callable[..., MaskedBatch]) -> None:
    full = make_batch([(16, 16), (16, 16), (16, 15)])
    rows = lay_out(full, masks_of(full, MaskConfig(), 0), CONFIG)
    assert rows.views.shape == (4, 256)
    assert (rows.views[3] == -1).all()


def test_rows_hold_contexts_and_target_blocks(batch: MaskedBatch, rows: Rows) -> None:
    masks = masks_of(batch, MaskConfig(), 0)
    cols = batch.packed.grids[:, 1]

    def tokens(index: torch.Tensor, views: torch.Tensor, row: int, view: int) -> list[int]:
        """Numbers in the view of what a line of `Rows` lists of it."""
        chosen = index[views == view]
        assert (rows.views[row][chosen] == view).all()
        places = rows.places[row][chosen]
        return (places[:, 0] * cols[view] + places[:, 1]).tolist()

    for view, mask in enumerate(masks):
        row = int((rows.views == view).any(dim=1).nonzero())
        assert tokens(rows.context[row], rows.context_views[row], row, view) == mask.context.tolist()
        for block, target in enumerate(mask.targets):
            line = block * len(rows.views) + row
            assert tokens(rows.targets[line], rows.target_views[line], row, view) == target.tolist()
    assert (rows.target_views >= 0).sum() == sum(len(target) for mask in masks for target in mask.targets)


def test_the_originals_features_are_ours(batch: MaskedBatch, rows: Rows) -> None:
    torch.manual_seed(0)
    encoder = Encoder(VisionTransformer(CONFIG), Preprocessing())
    with torch.no_grad():
        theirs = encode(encoder.network, rows.patches, rows.places, rows.views)
        ours = torch.split(encoder(batch.packed), list(batch.packed.segments.lengths))
    for view, features in enumerate(ours):
        # Float32 sums of hundreds of numbers, in another order, of features of size 4.
        torch.testing.assert_close(theirs[rows.views == view], features, rtol=0, atol=2e-5)


def losses_of(model: Original, rows: Rows) -> Losses:
    features = model.features(rows)
    return model.losses(model.predict(features, rows), model.targets(rows), features, rows, model.step_size(rows))


def test_padding_changes_nothing(rows: Rows) -> None:
    torch.manual_seed(0)
    model = Original(CONFIG, PredictorConfig(width=32, depth=1, heads=2))
    before = losses_of(model, rows).total
    patches = rows.patches.clone()
    patches[rows.views < 0] = 100.0
    torch.testing.assert_close(losses_of(model, rows._replace(patches=patches)).total, before)
    before.backward()
    assert all(value.grad is not None for value in model.trainable())


def test_the_loss_is_a_mean_over_the_tokens_of_all_target_blocks(batch: MaskedBatch, rows: Rows) -> None:
    torch.manual_seed(0)
    model = Original(CONFIG, PredictorConfig(width=32, depth=1, heads=2))
    targets = model.targets(rows)
    tokens = sum(len(block) for mask in masks_of(batch, MaskConfig(), 0) for block in mask.targets)
    assert model.step_size(rows) == (tokens, 1)
    # Off by 3, the smooth L1 distance is 3 - 0.5 at every token; float32 of size 10.
    losses = model.losses(targets + 3, targets, targets, rows, model.step_size(rows))
    assert losses.total.item() == pytest.approx(2.5, abs=1e-5)
    assert (losses.vicreg.item(), losses.contrastive.item()) == (0, 0)
