"""Fine-tuning learns with labels, each layer at its own rate, and leaves the encoder that it was given alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ijepa_enhanced import Encoder
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Pack
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.evaluate import finetune as finetune_module
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.evaluate.finetune import Classifier, finetune, parameter_groups
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.packed import Packed, Segments


@pytest.fixture
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig(variant="Ti", depth=2, patch_size=8).architecture, Preprocessing(32), 0)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_it_learns_and_repeats(encoder: Encoder, pictures: Path, rate: float) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    source = open_source(str(pictures))
    images = LabelledSource(source, open_catalog(source))
    setting = InferenceConfig(32, merge_rate=rate, workers=0)
    config = FinetuneConfig(epochs=30, lr=1e-3)
    first, again = (dict(finetune(encoder, images, images, setting, seed=1, training=config)) for _ in range(2))
    names = ["finetune", "finetune_top5", "finetune_mean_per_class", "finetune_low", "finetune_high"]
    assert list(first) == names
    assert first == again
    assert first["finetune"] == 1.0  # the classes differ in brightness
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_views_are_as_large_as_those_that_are_scored(
    encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    original = finetune_module.make_loader

    def spy(dataset: PackDataset, packs: Iterable[Pack], *arguments: Any, **options: Any) -> Any:
        seen = list(packs)
        tokens.extend(int(count) for pack in seen for count in pack.grids.prod(axis=1))
        return original(dataset, seen, *arguments, **options)

    monkeypatch.setattr(finetune_module, "make_loader", spy)
    source = open_source(str(pictures))
    images = LabelledSource(source, open_catalog(source))
    list(
        finetune(
            encoder,
            images,
            images,
            InferenceConfig(48, workers=0, tokens_per_pack=64),
            training=FinetuneConfig(epochs=1),
        )
    )
    # 48 x 48 px are 36 patches; at other aspect ratios that is rounded.
    assert len(tokens) == 10
    assert 30 <= min(tokens) <= max(tokens) <= 42


def test_a_view_skips_a_half_block_as_a_whole(encoder: Encoder) -> None:
    model = Classifier(encoder, 2, 0.5, seed=0).train()
    segments = Segments.of([3, 1, 5])
    model.cu_seqlens = [segments.cu_seqlens]
    seen = []
    for _ in range(500):
        output = model._skip(0.25, 0, model, None, torch.ones(9, 4))
        views = output.split([3, 1, 5])
        assert all(len(view.unique()) == 1 for view in views)
        seen.append([float(view[0, 0]) for view in views])
    kept = np.array(seen)
    assert set(kept.ravel()) == {0.0, np.float32(1 / 0.75)}
    # What is expected of a view stays the same: four standard errors of 1,500 draws.
    assert abs(kept.mean() - 1) < 4 * (1 / 3 / 1500) ** 0.5
    assert abs(np.corrcoef(kept.T)[0, 1]) < 0.2
    assert torch.equal(model.eval()._skip(0.25, 0, model, None, torch.ones(9, 4)), torch.ones(9, 4))


def test_nothing_is_skipped_when_it_is_scored(encoder: Encoder) -> None:
    rng = np.random.default_rng(0)
    packed = Packed.of_grids(rng.integers(0, 256, (12, 192), dtype=np.uint8), np.array([[2, 3], [3, 2]]))
    model = Classifier(encoder, 2, 0.5, seed=0)
    expected = encoder(packed).view(2, 6, -1).mean(dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().pooled(packed, None), expected)
        assert not torch.allclose(model.train().pooled(packed, None), expected)


def test_layers_have_their_own_rates(encoder: Encoder) -> None:
    model = Classifier(encoder, 3, 0.0, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, FinetuneConfig(layer_decay=0.5, weight_decay=0.1))
    found = {
        names[id(parameter)]: (group["share"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert len(groups) == len(set(found.values())) == 8  # four rates, with decay and without
    expected = {
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
        "encoder.network.blocks.norm.weight": (1.0, 0.0),
        "encoder.network.blocks.layers.1.fc2.weight": (0.5, 0.1),
        "encoder.network.blocks.layers.0.qkv.bias": (0.25, 0.0),
        "encoder.network.patch_embed.weight": (0.125, 0.1),
        "encoder.network.positions.rows": (0.125, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "finetune.epochs must be above 0, not 0."),
        ({"packs_per_step": 0}, "finetune.packs_per_step must be at least 1, not 0."),
        ({"weight_decay": -1.0}, "finetune.weight_decay must be at least 0, not -1.0."),
        ({"layer_decay": 1.5}, "finetune.layer_decay must be above 0 and at most 1, not 1.5."),
        ({"drop_path": 1.0}, "finetune.drop_path must be at least 0 and below 1, not 1.0."),
        ({"warmup": 2.0}, "finetune.warmup must be between 0 and 1, not 2.0."),
    ],
)
def test_what_makes_no_sense_is_an_error(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        FinetuneConfig(**change)  # type: ignore[arg-type]
    assert str(caught.value) == message
