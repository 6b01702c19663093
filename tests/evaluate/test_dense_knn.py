"""Patches get the labels of their nearest patches, weighted by similarity."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_enhanced.evaluate import dense_knn
from ijepa_enhanced.evaluate.dense_knn import NEIGHBORS, TEMPERATURE, PatchNeighbors

CPU = torch.device("cpu")
CLASSES = np.arange(4, dtype=np.uint8)


def some(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, 6] and shares of four labels [N, 4]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=random), torch.rand(count, 4, generator=random).softmax(dim=1)


@pytest.mark.parametrize("count", [7, 100])
def test_blocks_give_what_one_sort_gives(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_knn, "PATCHES", 23)
    monkeypatch.setattr(dense_knn, "QUERIES", 4)
    values, targets = some(count, 0)
    queries = some(9, 1)[0]
    similar = F.normalize(queries) @ F.normalize(values).T
    order = similar.argsort(dim=1, descending=True)[:, :NEIGHBORS]
    weights = (similar.gather(1, order) / TEMPERATURE).softmax(dim=1)
    expected = (weights[..., None] * targets[order]).sum(dim=1)
    found = PatchNeighbors(CLASSES, values, targets, CPU)(queries)
    # Shares of 1 from similarities that are rounded at 6e-8 and divided by 0.02.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(9), rtol=0, atol=1e-6)


def test_the_length_of_a_feature_says_nothing() -> None:
    values, targets = some(50, 0)
    queries = some(3, 1)[0]
    longer = PatchNeighbors(CLASSES, values * torch.rand(50, 1).add(0.5), targets, CPU)(queries * 7)
    torch.testing.assert_close(longer, PatchNeighbors(CLASSES, values, targets, CPU)(queries), rtol=0, atol=2e-5)
