import re

import pytest
import torch

from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.config import OptimConfig
from ijepa_enhanced.train.optimizer import make_optimizer, set_step, step_settings


def tiny_model() -> JEPA:
    return JEPA(EncoderConfig("Ti", 8, depth=1).architecture, PredictorConfig(32, 1, 2), ObjectiveConfig())


def test_schedules_of_the_first_middle_and_last_step() -> None:
    config = OptimConfig(
        lr=1.0, final_lr=0.1, warmup=0.5, weight_decay=0.0, final_weight_decay=1.0, ema=0.9, final_ema=1.0
    )
    first, third, middle, last = (step_settings(config, step, 9) for step in (0, 3, 4, 8))
    assert first[:3] == pytest.approx((1 / 4, 0.0, 0.9))
    assert third.lr == pytest.approx(1.0)
    assert middle[:3] == pytest.approx((1.0, 0.5, 0.95))
    assert last[:3] == pytest.approx((0.1, 1.0, 1.0))


def test_only_matrices_decay_and_the_teacher_is_not_optimized() -> None:
    model = tiny_model()
    names = {id(value): name for name, value in model.named_parameters()}
    optimizer = make_optimizer(model)
    set_step(optimizer, step_settings(OptimConfig(weight_decay=0.3), 0, 10))
    decayed, fixed = (
        {
            names[id(value)]
            for group in optimizer.param_groups
            if group["weight_decay"] == decay
            for value in group["params"]
        }
        for decay in (0.3, 0.0)
    )
    assert not any(name.startswith("teacher") for name in decayed | fixed)
    assert {"student.blocks.layers.0.qkv.weight", "predictor.head.weight", "student.patch_embed.weight"} <= decayed
    assert {
        "student.positions.rows",
        "predictor.mask_token",
        "student.blocks.norm.weight",
        "predictor.head.bias",
    } <= fixed
    learned = {name for name, value in model.named_parameters() if value.requires_grad}
    assert decayed | fixed == learned


def test_decay_is_decoupled_from_the_gradient() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model)
    set_step(optimizer, step_settings(OptimConfig(lr=0.1, warmup=0.0, weight_decay=0.5), 0, 10))
    weight = model.predictor.head.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    # AdamW with no gradient: w - lr * decay * w, exactly one float32 product away.
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be above 0, not 0.0."),
        ({"clip": -1.0}, "optim.clip must be above 0, not -1.0."),
        ({"final_lr": -1e-3}, "optim.final_lr must be at least 0, not -0.001."),
        ({"warmup": 1.5}, "optim.warmup must be between 0 and 1, not 1.5."),
        ({"lr": float("nan")}, "optim.lr must be above 0, not nan."),
        ({"lr": float("inf")}, "optim.lr must be finite, not inf."),
        ({"final_weight_decay": float("inf")}, "optim.final_weight_decay must be finite, not inf."),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OptimConfig(**values)
