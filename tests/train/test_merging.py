"""Training with token merging: the rates of the configuration reach the networks, and a run resumes as any other."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.blocks import Blocks
from ijepa_enhanced.models.config import MergeConfig
from ijepa_enhanced.train import loop
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train


@pytest.fixture
def merging(tiny: TrainConfig) -> TrainConfig:
    """Three steps in which student and teacher merge, at rates that tell them apart."""
    return dataclasses.replace(tiny, steps=3, merging=MergeConfig(student_rate=0.5, teacher_rate=0.25))


def test_each_network_merges_at_its_own_rate(
    merging: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The depth is one: a view of n tokens is left with ceil(n / 2) of the context and ceil(3 n / 4) of the whole."""
    plans: list[tuple[bool, MergePlan | None]] = []
    original = Blocks.forward

    def forward(blocks: Blocks, x, segments, plan=None, *more):  # type: ignore[no-untyped-def]
        plans.append((torch.is_grad_enabled(), plan))
        return original(blocks, x, segments, plan, *more)

    monkeypatch.setattr(Blocks, "forward", forward)
    train(dataclasses.replace(merging, steps=1, monitor=dataclasses.replace(merging.monitor, every=0)), tmp_path / "r")
    # Of each of two packs: the teacher without gradients, and the student.
    for (teaches, teacher), (studies, student) in (plans[:2], plans[2:4]):
        assert (teaches, studies) == (False, True)
        for plan, quarters in ((teacher, 3), (student, 2)):
            assert plan is not None
            before, after = (segments.lengths for segments in plan.segments)
            assert after == tuple(-(-n * quarters // 4) for n in before)


def test_merging_is_part_of_what_a_run_is(merging: TrainConfig, tmp_path: Path) -> None:
    train(merging, tmp_path / "merging")
    train(dataclasses.replace(merging, merging=MergeConfig()), tmp_path / "plain")
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("merging", "plain")]
    assert losses[0] != losses[1]


def test_a_merging_run_resumes_bit_for_bit(
    merging: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(merging, tmp_path / "whole")
    original = loop.JEPA.update_teacher

    def stop(model: loop.JEPA, momentum: float) -> None:
        original(model, momentum)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.JEPA, "update_teacher", stop)
    assert train(merging, tmp_path / "run").steps == 1
    monkeypatch.setattr(loop.JEPA, "update_teacher", original)
    assert train(merging, tmp_path / "run", resume=True).finished
    one, other = (Encoder.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
