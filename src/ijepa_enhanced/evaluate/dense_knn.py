"""Segmentation by the labels of the most similar training patches: what features say about places, without training."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.evaluate.standardize import BLOCK, roomiest

NEIGHBORS, TEMPERATURE = 30, 0.02
"""Patches that vote, and the temperature of their weights: those of Hummingbird (arXiv 2306.01667, appendix)."""
QUERIES, PATCHES = 1024, 2**14
"""Query and training patches whose similarities are in memory at once: 64 MiB of float32."""


class PatchNeighbors:
    """Labels by nearest patches: a patch gets the labels of the training patches with the most similar features.

    The weight of a neighbor of cosine similarity s is exp(s / `TEMPERATURE`), normalized over the `NEIGHBORS` nearest.
    It is the in-context protocol of Hummingbird (arXiv 2306.01667, section 3), without its approximate search.

    Args:
        classes: [C] labels, ascending.
        values: [N, D] features of training patches.
        targets: float32 [N, C] shares of each label in each of these patches.
        device: where to compute.
    """

    def __init__(self, classes: NDArray[np.uint8], values: Tensor, targets: Tensor, device: torch.device) -> None:
        self.classes = classes
        place = roomiest(device, 4 * values.numel())
        self.values = torch.cat([F.normalize(block.to(place).float()) for block in values.split(BLOCK)])
        self.targets = targets.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] -> shares of each label [T, C]."""
        return torch.cat([self._shares(F.normalize(part.to(self.device).float())) for part in tokens.split(QUERIES)])

    def _shares(self, queries: Tensor) -> Tensor:
        """Return the shares [Q, C] for normalized queries [Q, D]."""
        similar = queries.new_empty(len(queries), 0)
        nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for start in range(0, len(self.values), PATCHES):
            block = queries @ self.values[start : start + PATCHES].to(self.device).T
            values, rows = block.topk(min(NEIGHBORS, block.shape[1]), dim=1)
            similar, nearest = torch.cat([similar, values], dim=1), torch.cat([nearest, rows + start], dim=1)
            similar, kept = similar.topk(min(NEIGHBORS, similar.shape[1]), dim=1)
            nearest = nearest.gather(1, kept)
        weights = torch.softmax(similar / TEMPERATURE, dim=1)
        return torch.einsum("qk,qkc->qc", weights, self.targets[nearest])
