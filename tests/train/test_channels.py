"""Train on images that are not RGB."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError, SourceError
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.inflate import inflated
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.train import start
from ijepa_enhanced.train.config import MonitorConfig, TrainConfig
from ijepa_enhanced.train.loop import train

BANDS = 5
WEIGHTS = Architecture(32, 1, 2, 64, 8, patch_embed="mlp")


@pytest.fixture
def config(tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run of two steps on images of five channels and 16 bits, one of which has only three channels."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        shape = (*rng.integers(32, 50, 2), BANDS if number else 3)
        np.save(folder / f"{number:02d}.npy", rng.integers(0, 9000, shape, dtype=np.uint16))
    data = dataclasses.replace(tiny.data, source=str(folder), channels=BANDS, max_unreadable=0.1)
    return dataclasses.replace(tiny, data=data, monitor=MonitorConfig(every=0), steps=2, checkpoint_every=1)


def test_a_run_keeps_the_statistics_and_resumes_with_them(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(config, tmp_path / "run")
    assert "Skipped 00.npy: has 3 channels instead of 5 (data.channels)" in caplog.messages
    measured = json.loads((tmp_path / "run" / "statistics.json").read_text())
    encoder = Encoder.from_pretrained(tmp_path / "run")
    assert encoder.config.channels == encoder.preprocessing.channels == BANDS
    assert [*encoder.preprocessing.mean] == measured["mean"]
    assert [*encoder.preprocessing.std] == measured["std"]
    np.testing.assert_allclose(measured["mean"], [4500 / 65535] * BANDS, rtol=0.05)  # uniform noise, 30,000 values
    monkeypatch.setattr(start, "statistics_of", lambda *_: pytest.fail("measured again"))
    assert train(config, tmp_path / "run", resume=True).steps == 2
    images = [np.load(tmp_path / "tiles" / f"{number:02d}.npy") for number in (1, 2)]
    features = encoder.embed(images)
    torch.testing.assert_close(features, encoder.embed([torch.from_numpy(x).movedim(2, 0) for x in images]))
    assert main(["export", "torch", str(tmp_path / "run"), str(tmp_path / "run.pt2")]) == 2
    assert "takes images of 5 channels, but exported programs take RGB of 8 bits." in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"^An array must be uint8, uint16 or float \[height, width, 5\], not uint16"):
        encoder.embed([images[0][..., :3]])


def test_weights_for_rgb_start_a_run_on_other_channels(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Encoder.random(WEIGHTS, Preprocessing(40), 3).save_pretrained(tmp_path / "weights")
    weights = dataclasses.replace(config, init=str(tmp_path / "weights"), steps=1)
    train(weights, tmp_path / "run")
    assert (
        f"The patch embedding of {tmp_path}/weights is for 3 channels: each of the 5 channels of the images gets their "
        "mean." in caplog.messages
    )
    assert Encoder.from_pretrained(tmp_path / "run" / "start").preprocessing.channels == BANDS
    for option, value, data, message in (
        (
            "teacher",
            "weights",
            BANDS,
            "teacher {} is an encoder of images with 3 channels, but data.channels is 5. Set ",
        ),
        ("init", "run", 3, "init {} is an encoder of images with 5 channels, but data.channels is 3. Set "),
    ):
        place = str(tmp_path / value)
        wrong = dataclasses.replace(config, **{option: place}, data=dataclasses.replace(config.data, channels=data))
        with pytest.raises(EncoderError, match=f"^{re.escape(message.format(place))}"):
            train(wrong, tmp_path / "new")
    with pytest.raises(
        SourceError, match=r"tiles have 5 channels, but data\.channels is 3\. Set data\.channels to 5\.$"
    ):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, channels=3)), tmp_path / "new")


@pytest.mark.parametrize("patch_embed", ["linear", "mlp"])
def test_gray_images_have_the_same_features_through_inflated_weights(patch_embed: str) -> None:
    network = VisionTransformer(dataclasses.replace(WEIGHTS, patch_embed=patch_embed)).eval()
    gray = np.random.default_rng(0).normal(size=(6, 64, 1)).astype(np.float32)
    before, after = (
        module(Packed.of_grids(gray.repeat(channels, axis=2).reshape(6, -1), np.array([[2, 3]])))
        for module, channels in ((network, 3), (inflated(network, BANDS), BANDS))
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)  # sums in another order
