"""In a step, the host does not wait for the device: it asks for no value that the device computes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.evaluate.finetune import Classifier, _step, parameter_groups
from ijepa_enhanced.evaluate.tokens import InferenceConfig
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.step import train_step

ASKING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select", "aten.equal")
"""Operations that `item`, `float`, `bool` and value-dependent sizes call."""


class Asked(TorchDispatchMode):
    """Records the operations of `ASKING` that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(ASKING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def pretraining(make_batch: Callable[..., Any]) -> Callable[[], object]:
    sizes = EncoderConfig("Ti", 8, depth=1).architecture, PredictorConfig(32, 1, 2)
    model = JEPA(*sizes, ObjectiveConfig(contrastive_weight=0.5), 2)
    optimizer, batch = make_optimizer(model), make_batch([(4, 5)] * 4, depth=1, rates=(0.1, 0.1))
    size, settings = StepSize(len(batch.targets.index), 1), StepSettings(1e-3, 0.05, 0.9)
    autocast = torch.autocast("cpu", enabled=False)
    return lambda: (
        train_step(model, model, optimizer, [batch], size, settings, 1.0, autocast, torch.device("cpu")).grad_norm
    )


def finetuning(make_batch: Callable[..., Any]) -> Callable[[], object]:
    encoder = Encoder.random(EncoderConfig("Ti", 8, depth=1).architecture, Preprocessing(32), 0)
    model = Classifier(encoder, 2, 0.1, seed=0).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, FinetuneConfig()), lr=0.0, fused=True)
    batch = dataclasses.replace(make_batch([(4, 5)] * 2, depth=1), labels=torch.tensor([0, 1]))
    return lambda: _step(model, optimizer, [batch], 2, torch.tensor([0, 1]), InferenceConfig(32))


@pytest.mark.parametrize("kind", [pretraining, finetuning])
def test_a_step_asks_for_no_value(kind: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    step = kind(make_batch)
    step()  # moments are made in the first step
    with Asked() as asked:
        norm = step()
        assert asked.found == []
        assert norm.read().isfinite()
    assert asked.found == ["aten._local_scalar_dense.default"]
