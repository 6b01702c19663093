"""Files of ONNX and torch.export compute the encoder's features, for images of any size and in batches."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.export import program, to_onnx, to_torch
from ijepa_enhanced.export.program import EqualViews, Shape, distance, equal_attention, equal_matches, trace
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.attention import cpu_attention
from ijepa_enhanced.ops.merging import best_matches, match
from ijepa_enhanced.packed import Segments
from released import ANTIALIASED, DINO, FIXED, TABLE, small

# Norm of the difference by the norm: float32 rounds at 6e-8, through at most two blocks. 4.6e-7 was the largest seen.
BOUND = 2e-6

ARCHITECTURES: dict[str, Architecture] = {
    "factorized": small(position_grid=(5, 5)),
    "mlp": small(position_grid=(5, 5), patch_embed="mlp"),
    "linear resampling, keeps aspect": small(
        position_grid=(5, 5), resampling="linear", square_positions=True, registers=1, norm_pooled=True
    ),
    "sincos squeezed": small(positions="sincos", position_grid=(5, 5)),
    "sincos": small(**FIXED),
    "table": small(**TABLE, class_token=True),
    "table with antialiasing": small(**ANTIALIASED, **DINO, registers=3, gated=True),
    "rope": small(positions="rope", **DINO, registers=4),
}
SIZES = [(5, 5), (2, 9), (12, 4), (7, 8), (1, 3)]
"""In patches: on the table of positions, and longer than it one way or the other."""


def encoder_of(config: Architecture) -> Encoder:
    """Weights as after training: none is 0 or 1, so that each of them takes part."""
    torch.manual_seed(0)
    network = VisionTransformer(config)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    grid = (6, 7) if config.positions == "factorized" else None
    pooling: Any = "cls" if config.class_token else "mean"
    preprocessing = Preprocessing(40, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1), trained_grid=grid, pooling=pooling)
    return Encoder(network, preprocessing).eval()


def images_of(batch: int, rows: int, cols: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (batch, 8 * rows, 8 * cols, 3), dtype=np.uint8)


def assert_equal(found: tuple[Tensor, Tensor], encoder: Encoder, images: Any, rate: float = 0.0) -> None:
    """Compare the outputs of a program with what the encoder says of images [V, height, width, 3]."""
    feature, maps = found
    assert distance(feature, encoder.embed(images, "native", rate)) < BOUND
    assert distance(maps, torch.stack(encoder.feature_maps(images, "native", rate))) < BOUND


def planar(images: Any) -> Any:
    """[V, height, width, 3] -> [V, 3, height, width]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_of_one_size_is_a_packed_stream(name: str, rate: float) -> None:
    encoder = encoder_of(ARCHITECTURES[name])
    for grid in SIZES[1:4]:
        images = images_of(2, *grid)
        plan = encoder.merge_plan(Segments.of([encoder.config.prefix + grid[0] * grid[1]] * 2), rate)
        assert_equal(EqualViews(encoder, plan)(torch.from_numpy(planar(images))), encoder, images, rate)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_of_equal_views(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 14, 2, 8, generator=generator).unbind()
    edges = Segments.of([7, 7]).cu_seqlens
    bias = torch.rand(14, generator=generator) if biased else None
    expected, _ = cpu_attention(q, k, v, edges, edges, bias)
    torch.testing.assert_close(equal_attention(q, k, v, edges, edges, bias)[0], expected)


@pytest.mark.parametrize("length", [2, 9, 200])
@pytest.mark.parametrize("prefix", [0, 3])
def test_matches_of_equal_views(length: int, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of few values, so that many are equal: ties must go the same way."""
    plan = MergePlan.of([length + prefix] * 3, 0.3, 1, prefix=prefix)
    metric = torch.randint(0, 3, (3 * (length + prefix), 4), generator=torch.Generator().manual_seed(0)).float()
    directions = torch.nn.functional.normalize(metric, dim=1)
    expected = best_matches(directions, plan.tiles, *plan.tile_bounds)
    found = equal_matches(3, prefix)(directions, plan.tiles, *plan.tile_bounds)
    assert torch.equal(found & (2**31 - 1), expected & (2**31 - 1))  # whom each token matches
    expected_merges = match(metric, plan, 0)
    monkeypatch.setattr("ijepa_enhanced.ops.merging.best_matches", lambda *_: found)
    assert torch.equal(match(metric, plan, 0).origin, expected_merges.origin)  # and which pairs merge


def export(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["export", *map(str, arguments)])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


ONE_BLOCK = small(**ANTIALIASED, **DINO, registers=2, depth=1)


@pytest.mark.slow
def test_onnx_of_any_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    encoder = encoder_of(ONE_BLOCK)
    encoder.save_pretrained(tmp_path / "encoder")
    file = tmp_path / "new" / "any.onnx"
    code, out, err = export("onnx", tmp_path / "encoder", file, "--json")
    assert (code, err) == (0, [])
    assert out[:3] == [
        "images       uint8 [1, 3, 8 * rows, 8 * columns], RGB, not normalized",
        "feature      float32 [1, 48]",
        "feature_map  float32 [1, rows, columns, 48]",
    ]
    assert json.loads(out[-1])["difference"] < BOUND
    run = to_onnx.session(file)
    for grid in SIZES:
        images = images_of(1, *grid)
        assert_equal(run(planar(images)), encoder, images)
    session = onnxruntime.InferenceSession(file)
    assert session.get_inputs()[0].shape == [1, 3, "height", "width"]
    assert session.get_outputs()[1].shape == [1, "rows", "columns", 48]
    assert session.get_modelmeta().custom_metadata_map == {"patch_size": "8", "resolution": "40", "pooling": "cls"}


@pytest.mark.slow
def test_onnx_that_merges_a_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    encoder = encoder_of(ONE_BLOCK)
    to_onnx.export(encoder, tmp_path / "merged.onnx", Shape(batch=3, grid=(6, 5), merge_rate=0.3))
    images = images_of(3, 6, 5)
    assert_equal(to_onnx.session(tmp_path / "merged.onnx")(planar(images)), encoder, images, 0.3)


@pytest.mark.slow
def test_torch_file_of_any_size_needs_nothing_of_ours(tmp_path: Path) -> None:
    encoder = encoder_of(ONE_BLOCK)
    encoder.save_pretrained(tmp_path / "encoder")
    code, _, err = export("torch", tmp_path / "encoder", tmp_path / "any.pt2", "--batch", "2")
    assert (code, err) == (0, [])
    with program.quiet():
        loaded = torch.export.load(tmp_path / "any.pt2")
    assert not [node for node in loaded.graph.nodes if "ijepa" in str(node.target)]
    module = loaded.module()
    for grid in SIZES[:-1]:  # at least 2 x 2
        images = images_of(2, *grid)
        with torch.no_grad():
            assert_equal(module(torch.from_numpy(planar(images))), encoder, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_onnx_of_every_architecture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    encoder = encoder_of(ARCHITECTURES[name])
    for number, shape in enumerate([Shape(), Shape(2, (6, 7), 0.1)]):
        file = tmp_path / f"{number}.onnx"
        to_onnx.export(encoder, file, shape)
        for grid in [shape.grid] if shape.grid else SIZES:
            images = images_of(shape.batch, *grid)
            assert_equal(to_onnx.session(file)(planar(images)), encoder, images, shape.merge_rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_file_of_every_architecture(name: str) -> None:
    encoder = encoder_of(ARCHITECTURES[name])
    for shape in (Shape(), Shape(2, (6, 7), 0.1)):
        module = trace(encoder, shape).module()
        for grid in [shape.grid] if shape.grid else SIZES[:-1]:
            images = images_of(shape.batch, *grid)
            with torch.no_grad():
                assert_equal(module(torch.from_numpy(planar(images))), encoder, images, shape.merge_rate)


@pytest.mark.parametrize("output", [0, 1])
def test_a_program_that_computes_nan_at_one_size_does_not_pass(output: int) -> None:
    encoder = encoder_of(ONE_BLOCK)
    sizes = []

    def run(images: Any) -> tuple[Tensor, Tensor]:
        sizes.append(images.shape)
        outputs = EqualViews(encoder, None)(torch.from_numpy(images))
        if len(sizes) == 3:
            outputs[output].fill_(torch.nan)
        return outputs

    with pytest.raises(RunError, match="It computes other features than PyTorch: they differ by nan"):
        program.check(encoder, Shape(), run, "It")
    assert len(sizes) == 5


class Zeros(torch.nn.Module):
    """A program with the right interface and other results."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 48), torch.zeros(1, 3, 3, 48)


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_of(ONE_BLOCK).save_pretrained(tmp_path / "encoder")
    images = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    monkeypatch.setattr(to_torch, "trace", lambda *_: torch.export.export(Zeros(), (images,)))
    assert export("torch", tmp_path / "encoder", tmp_path / "wrong.pt2", "--grid", "3x3") == (
        1,
        [],
        [
            "ijepa: The exported program computes other features than PyTorch: they differ by 1.0e+00, relative to "
            "their norm, and rounding explains at most 1e-04. Nothing was written."
        ],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
