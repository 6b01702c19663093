"""Compiled once, encoder and predictor run packs of any shapes without another compilation, and change no result."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig
from one_pack import make_colors

# Norm of the difference by the norm. Fused kernels round in other places: float32 is 6e-8, measured 4e-7.
BOUND = 2e-6

# The first compiles; the others have other numbers of views, of tokens and of longest views. Packs of one or two views
# are left out: torch specialises on 1, and on the 2 that is also the width of the positions, once each. The first has
# not as many views as a map of colors has rows or columns: 3 or 4.
PACKS = [
    [(3, 3), (9, 9), (2, 2), (1, 8), (7, 5)],
    [(5, 4), (3, 7), (4, 4)],
    [(4, 6), (6, 4), (5, 5), (2, 3)],
    [(2, 2), (1, 4), (3, 2)],
    [(3, 3)] * 9,
    [(8, 8), (4, 8), (4, 8)],  # 128 tokens, which need no pad rows (ops/linear.py)
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# The compiler's own (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "backend",
    [
        # Traces, guards and differentiates as the other does, but leaves out the minutes of C++.
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
# Rates of teacher and student, whose plans differ from pack to pack. One layer of small views would have as many tiles
# as views, and torch takes sizes that are equal in the first pack for one size.
@pytest.mark.parametrize(("depth", "rates"), [(1, (0.0, 0.0)), (2, (0.2, 0.3))])
def test_packs_of_any_shape_run_on_one_compilation_and_agree_with_eager(
    make_batch: Callable[..., MaskedBatch], depth: int, rates: tuple[float, float], backend: str
) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(variant="Ti", depth=depth, patch_size=8).architecture
    jepa = JEPA(config, PredictorConfig(width=32, depth=1, heads=2), ObjectiveConfig())

    def run(batch: MaskedBatch) -> list[Tensor]:
        """Features, predictions, and the gradients of the student and the predictor."""
        batch = jepa.preprocess(batch)
        with torch.no_grad():
            features = jepa.teacher(batch.packed, batch.merge_plan)
        visible, hidden = batch.packed.select(batch.context), batch.packed.select(batch.targets)
        predicted = jepa.predictor(jepa.student(visible, batch.seen_merge_plan), visible, hidden)
        predicted.square().sum().backward()
        gradients = torch.cat([value.grad.flatten() for value in jepa.parameters() if value.grad is not None])
        jepa.zero_grad()
        return [features, predicted.detach(), gradients]

    batches = [
        dataclasses.replace(make_batch(grids, number, depth=depth, rates=rates), colors=make_colors(len(grids)))
        for number, grids in enumerate(PACKS)
    ]
    eager = [run(batch) for batch in batches]
    # As train/loop.py does.
    for module in (jepa.normalize, jepa.student, jepa.teacher, jepa.predictor):
        module.compile(dynamic=True, fullgraph=True, backend=backend)
    compiled = [run(batches[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled += [run(batch) for batch in batches[1:]]
    for found, expected in zip(compiled, eager, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < BOUND * other.norm()
