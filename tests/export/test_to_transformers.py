"""Folders of transformers: keys, positions, refusals, and outputs equal to those of transformers, if installed."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer
from released import ANTIALIASED, DINO, FIXED, LAYOUTS, TABLE, network_of, small, write

LAYOUTS_OF_TRANSFORMERS = [name for name in LAYOUTS if not name.startswith(("timm", "naflex"))]
# Norm of the difference by the norm: float32 rounds at 6e-8, through two blocks. 2.4e-7 was the largest seen.
BOUND = 2e-6


def export(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["export", *map(str, arguments)])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def saved(folder: Path, config: Architecture, **preprocessing: Any) -> Encoder:
    """A random encoder, and its folder."""
    torch.manual_seed(0)
    network = VisionTransformer(config)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    values = {"resolution": 40, "pooling": "cls" if config.class_token else "mean"} | preprocessing
    encoder = Encoder(network, Preprocessing(**values), Origin("org/name", "ours", "cc-by-nc-4.0")).eval()
    encoder.save_pretrained(folder)
    return encoder


@pytest.mark.parametrize("name", LAYOUTS_OF_TRANSFORMERS)
def test_files_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    config, writer = LAYOUTS[name]
    config = dataclasses.replace(config, hidden=96)  # twice the width: Dinov2 has whole multiples
    state, description = writer(network_of(config))
    write(tmp_path / "theirs", state, description)
    code, _, err = export("transformers", tmp_path / "theirs", tmp_path / "back")
    assert (code, err) == (0, [])
    found = load_file(tmp_path / "back" / "model.safetensors")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    if "in memory" not in name:
        dropped = {"pooler.dense.weight", "pooler.dense.bias"}
        added = {key for key in found if key.endswith("k_proj.bias")}  # DINOv3's keys have none
        assert {*found} - added == {*state} - dropped
        # A position of the class token is added to it when it is read.
        moved = ("embeddings.cls_token", "embeddings.position_embeddings")
        assert all(torch.equal(value, found[key]) for key, value in state.items() if key not in {*dropped, *moved})
        assert {key: values[key] for key in description if key in values} == {
            key: value for key, value in description.items() if key in values
        }
    before, after = (Encoder.from_pretrained(tmp_path / folder) for folder in ("theirs", "back"))
    assert before.config == after.config
    assert before.preprocessing == after.preprocessing
    weights = after.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in before.network.state_dict().items())


MODELS: dict[str, tuple[Architecture, str, dict[str, Any]]] = {
    "IJepaModel": (small(position_grid=(8, 8)), "4x7", {}),
    "IJepaModel of squeezed positions": (small(position_grid=(8, 8)), "5x5", {"trained_grid": (3, 4)}),
    "IJepaModel of fixed positions": (small(**FIXED), "6x6", {}),
    "ViTModel": (small(**TABLE, class_token=True), "3x6", {}),
    "Dinov2Model": (small(**TABLE, **DINO, hidden=96), "7x7", {}),
    "Dinov2Model with SwiGLU": (small(**TABLE, **DINO, gated=True), "5x5", {}),
    "Dinov2WithRegistersModel": (small(**ANTIALIASED, **DINO, registers=2, hidden=144), "4x4", {}),
    "DINOv3ViTModel": (small(positions="rope", **DINO, registers=2), "3x5", {}),
    "DINOv3ViTModel with SwiGLU": (small(positions="rope", **DINO, gated=True), "3x5", {}),
}
"""By the model of transformers: an encoder, the grid to export, and its preprocessing."""


def test_the_license_that_a_card_states_is_exported(tmp_path: Path) -> None:
    """The encoder was trained from scratch, so it has no origin."""
    encoder = saved(tmp_path / "ours", small())
    encoder.origin = None
    encoder.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nCats.\n")
    assert export("transformers", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    assert "\nlicense: cc-by-nc-4.0\n" in (tmp_path / "theirs" / "README.md").read_text()


def picture(grid: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rows, cols = map(int, grid.split("x"))
    return np.random.default_rng(0).integers(0, 256, (8 * rows, 8 * cols, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_our_own_encoders_come_back_exactly_at_the_grid(name: str, tmp_path: Path) -> None:
    config, grid, preprocessing = MODELS[name]
    encoder = saved(tmp_path / "ours", config, **preprocessing)
    code, out, err = export("transformers", tmp_path / "ours", tmp_path / "theirs", "--grid", grid, "--json")
    assert (code, err) == (0, [])
    assert json.loads(out[-1])["model"] == name.split()[0]
    back = Encoder.from_pretrained(tmp_path / "theirs")
    assert back.origin is not None
    assert back.origin.license == "cc-by-nc-4.0"
    images = [picture(grid)]
    assert torch.equal(back.embed(images, "native"), encoder.embed(images, "native"))
    assert torch.equal(back.feature_maps(images, "native")[0], encoder.feature_maps(images, "native")[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # of other libraries
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config, grid, preprocessing = MODELS[name]
    encoder = saved(tmp_path / "ours", config, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1), **preprocessing)
    assert export("transformers", tmp_path / "ours", tmp_path / "theirs", "--grid", grid)[0] == 0
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert type(model).__name__ == name.split()[0]
    assert not report["unexpected_keys"]
    assert {key for key in report["missing_keys"] if not key.startswith("pooler.")} == set()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    image = picture(grid)
    with torch.no_grad():
        tokens = model.eval()(**processor(image, return_tensors="pt")).last_hidden_state[0]
    expected = encoder.feature_maps([image], "native")[0].flatten(0, 1)
    assert (tokens[encoder.config.prefix :] - expected).norm() < BOUND * expected.norm()
    feature = tokens[0] if encoder.config.class_token else tokens.mean(dim=0)
    assert (feature - encoder.embed([image], "native")[0]).norm() < BOUND * feature.norm()


PARTS = "transformers cannot run this encoder: none of its models has all of these parts and no others: "
REFUSED: dict[str, tuple[Architecture, dict[str, Any], str, str]] = {
    "a patch embedding with a hidden layer": (
        small(patch_embed="mlp"),
        {},
        "transformers new",
        "transformers cannot run this encoder: its patch embedding has a hidden layer (encoder.patch_embed: mlp).",
    ),
    "a norm after pooling": (
        small(norm_pooled=True),
        {},
        "transformers new",
        "transformers cannot run this encoder: its final LayerNorm comes after pooling, not before.",
    ),
    "a class token that is not the feature": (
        small(class_token=True),
        {"pooling": "mean"},
        "transformers new",
        "transformers cannot run this encoder: it has a class token, but the feature of an image is the mean of its "
        "patches.",
    ),
    "registers alone": (small(registers=1), {}, "transformers new", f"{PARTS}registers."),
    "SwiGLU without layer scale": (
        small(class_token=True, gated=True),
        {},
        "transformers new",
        f"{PARTS}a class token, SwiGLU.",
    ),
    "a grid that Dinov2 cannot have": (
        small(**TABLE, **DINO),
        {},
        "transformers new --grid 3x4",
        "Dinov2Model has positions of square grids only, not of 3x4. Change --grid.",
    ),
    "a hidden layer that Dinov2 cannot have": (
        small(**TABLE, **DINO),
        {},
        "transformers new",
        "Dinov2Model cannot have a hidden layer of 64 at a width of 48: its mlp_ratio is a whole number.",
    ),
    "native size without a grid": (
        small(),
        {"resolution": None},
        "transformers new",
        "ours was trained at the native size of each image. Give the size for which positions are computed: --grid "
        "ROWSxCOLUMNS.",
    ),
    "a grid of words": (
        small(),
        {},
        "onnx new --grid large",
        "--grid must be ROWSxCOLUMNS, both at least 1, for example 14x14, not large.",
    ),
    "a grid of nothing": (
        small(),
        {},
        "torch new --grid 0x4",
        "--grid must be ROWSxCOLUMNS, both at least 1, for example 14x14, not 0x4.",
    ),
    "a place that is taken": (small(), {}, "torch ours", "ours already exists. Give another OUT."),
    "merging without a size": (
        small(),
        {},
        "onnx new --merge-rate 0.1",
        "--merge-rate requires --grid ROWSxCOLUMNS, because how many tokens merge depends on the size.",
    ),
    "an unknown format": (
        small(),
        {},
        "tflite new",
        "Unknown format 'tflite'. Available: transformers, onnx, torch.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, preprocessing, arguments, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    saved(Path("ours"), config, **preprocessing)
    kind, *others = arguments.split()
    assert export(kind, "ours", *others) == (2, [], [f"ijepa: {message}"])
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "Exporting to ONNX requires onnx. Install it with: pip install 'ijepa-enhanced[export]'"
    assert export("onnx", "ours", tmp_path / "new") == (2, [], [f"ijepa: {message}"])
