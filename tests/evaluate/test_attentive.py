"""The attentive probe is a cross-attention block on segments of any length, and finds what pooling loses."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced import Encoder
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate import attentive as attentive_module
from ijepa_enhanced.evaluate.attentive import AttentiveClassifier, attentive, segment_softmax
from ijepa_enhanced.evaluate.tokens import (
    InferenceConfig,
    LabelledSource,
    Tokens,
    check_space,
    packs_of,
    stored_tokens,
    uncounted,
)
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.packed import Segments


def by_definition(probe: AttentiveClassifier, tokens: Tensor) -> Tensor:
    """Logits of one image with PyTorch's attention, whose keys and values are computed for each token."""
    x = F.layer_norm(tokens, tokens.shape[1:], eps=1e-6)
    q, k, v = (
        layer(y).unflatten(-1, (probe.heads, -1)).transpose(0, 1)
        for layer, y in ((probe.q, probe.query[None]), (probe.k, x), (probe.v, x))
    )
    y = probe.query + probe.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    y = y + probe.fc2(F.gelu(probe.fc1(F.layer_norm(y, y.shape[1:], probe.norm.weight, probe.norm.bias, eps=1e-6))))
    return probe.head(y)


def test_a_packed_batch_is_the_block_on_each_image() -> None:
    torch.manual_seed(0)
    probe = AttentiveClassifier(12, 3, 5)
    with torch.no_grad():  # so that nothing is small enough to be missed
        for parameter in probe.parameters():
            parameter.normal_()
    segments = Segments.of([3, 1, 7])
    tokens = torch.randn(11, 12)
    found = probe(tokens, segments.cu_seqlens)
    expected = torch.cat([by_definition(probe, view) for view in tokens.split([3, 1, 7])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parameters = list(probe.parameters())
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_the_softmax_of_a_segment_does_not_overflow() -> None:
    logits = torch.tensor([[1000.0], [1001.0], [-1000.0]])
    shares = segment_softmax(logits, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(shares[:, 0], torch.tensor([1 / (1 + 2.718282), 2.718282 / (1 + 2.718282), 1.0]))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig(variant="Ti", depth=2, patch_size=8).architecture, Preprocessing(32), 0)


@pytest.fixture
def images(pictures: Path) -> LabelledSource:
    source = open_source(str(pictures))
    return LabelledSource(source, open_catalog(source))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_stored_tokens_are_those_of_the_maps(encoder: Encoder, images: LabelledSource, rate: float) -> None:
    setting = InferenceConfig(32, merge_rate=rate, workers=0, tokens_per_pack=64)
    maps = encoder.feature_maps([images.source.open(row) for row in range(10)], 32, rate)
    with stored_tokens(encoder, images, setting, uncounted) as tokens:
        assert tokens.grids.tolist() == [[*view.shape[:2]] for view in maps]
        expected = torch.cat([view.flatten(0, 1) for view in maps])
        # bfloat16 keeps 8 bits.
        torch.testing.assert_close(tokens.values.float(), expected, rtol=2**-8, atol=1e-5)
        assert tokens.labels is not None
        assert tokens.labels.tolist() == [0] * 5 + [1] * 5


def test_stored_tokens_leave_no_file(encoder: Encoder, images: LabelledSource, index_cache: Path) -> None:
    before = set(index_cache.iterdir())
    with stored_tokens(encoder, images, InferenceConfig(32, workers=0), uncounted):
        assert set(index_cache.iterdir()) == before, "nor does a process that is killed"
    assert set(index_cache.iterdir()) == before


def test_it_finds_one_patch_in_many_that_the_mean_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class stands in a single token, in a direction that all other tokens fill with noise."""
    monkeypatch.setattr(attentive_module, "LEAST_STEPS", 160)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1500) % 2
    lengths = torch.randint(10, 30, (1500,), generator=generator)
    values = torch.randn(int(lengths.sum()), 48, generator=generator)
    marked = lengths.cumsum(0) - 1 - torch.arange(1500) % 10
    values[marked, 0] = 8.0  # how to find it
    values[marked, 1] = 3.0 * (2 * labels - 1)
    tokens = Tokens(values.bfloat16(), lengths, torch.empty(0), torch.arange(1500), labels)
    torch.manual_seed(0)
    start = AttentiveClassifier(48, 2, 2)
    probe = attentive_module._trained(start, tokens, labels, torch.arange(1000), 3e-3, 0, uncounted)
    right = attentive_module._logits(probe, tokens, torch.arange(1000, 1500)).argmax(dim=1) == labels[1000:]
    # The best that the mean can do, at 3 / 20 of a deviation of 1 / sqrt(20): 75%.
    assert right.double().mean() > 0.9


def test_it_scores_and_repeats(encoder: Encoder, images: LabelledSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive_module, "LEAST_STEPS", 20)
    first, again = (dict(attentive(encoder, images, images, InferenceConfig(32, workers=0), seed=3)) for _ in range(2))
    assert first == again
    names = ["attentive", "attentive_top5", "attentive_mean_per_class", "attentive_low", "attentive_high"]
    assert list(first) == names
    assert first["attentive"] == 1.0  # the classes differ in brightness


def test_one_image_of_each_class_gets_the_middle_rate(
    encoder: Encoder, images: LabelledSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentive_module, "LEAST_STEPS", 20)
    trained, train = [], attentive_module._trained

    def spy(*arguments: Any) -> AttentiveClassifier:
        trained.append(arguments[4])
        return train(*arguments)

    monkeypatch.setattr(attentive_module, "_trained", spy)
    two = dataclasses.replace(images, catalog=images.catalog.select(np.array([0, 5])))
    list(attentive(encoder, two, images, InferenceConfig(32, workers=0)))
    assert trained == [1e-3]


def test_tokens_that_the_disk_cannot_hold_are_refused_before_any_is_computed(
    encoder: Encoder,
    images: LabelledSource,
    index_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sources of ten images of 16 tokens, give or take some for their shapes, of 384 bytes each."""
    setting = InferenceConfig(32, workers=0)
    tokens = sum(int(pack.grids.prod(axis=1).sum()) for pack in packs_of(encoder, images.catalog, setting))
    free = 2 * tokens * 2 * 192
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    monkeypatch.setattr(encoder, "last_layers", None)  # it would fail
    with pytest.raises(RequestError) as caught:
        list(attentive(encoder, images, images, setting))
    assert str(caught.value) == (
        f"attentive needs 0.0 GB in {index_cache} for the features of {2 * tokens} patches, but only 0.0 GB are free. "
        "Lower --resolution, use fewer images, or set IJEPA_CACHE to a folder on a larger disk."
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    check_space("attentive", encoder, (images, images), setting)


def test_a_cache_folder_that_is_not_there_yet_has_the_space_of_its_disk(
    encoder: Encoder, images: LabelledSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "not" / "yet"))
    check_space("attentive", encoder, (images, images), InferenceConfig(32, workers=0))
