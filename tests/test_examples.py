"""The scripts of examples/ run as they are, with random weights in the layout of DINOv2."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ijepa_enhanced.encoder import Encoder
from released import LAYOUTS, network_of, write

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    architecture, layout = LAYOUTS["dinov2"]
    return write(tmp_path / "dinov2", *layout(network_of(architecture)))


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_embed_folder(
    dinov2: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "embed_folder.py", str(pictures), "--weights", str(dinov2), "--out", str(tmp_path / "z.pt"))
    saved = torch.load(tmp_path / "z.pt", weights_only=True)
    paths = [pictures / key for key in saved["keys"]]
    expected = Encoder.from_pretrained(dinov2).embed(paths)
    torch.testing.assert_close(saved["embeddings"], expected, rtol=1e-4, atol=1e-5)
    assert len(capsys.readouterr().out.splitlines()) == len(paths)


def test_continue_training(
    dinov2: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, load = [], Encoder.from_pretrained
    monkeypatch.setattr(Encoder, "from_pretrained", lambda path: loaded.append(str(path)) or load(path))
    images, folder = str(pictures), str(tmp_path / "run")
    given = ["--weights", str(dinov2), "--run", folder, "--steps", "2", "--labeled", images]
    run(monkeypatch, "continue_training.py", images, *given)
    assert loaded.count(str(dinov2)) == 1
    before, after = (Encoder.from_pretrained(f"{folder}/{name}") for name in ("start", "encoder"))
    assert torch.equal(before.network.prefix, Encoder.from_pretrained(dinov2).network.prefix)
    assert not torch.equal(before.network.prefix, after.network.prefix)
    table = capsys.readouterr().out
    assert re.search(r"start .* trained ", table)
    assert "linear" in table


def test_an_error_ends_the_example_with_the_code_of_the_command(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "continue_training.py", str(pictures), "--weights", str(tmp_path / "none"))


def test_finetune_and_export(
    dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out, labeled = tmp_path / "classifier", tmp_path / "labeled"
    quarter_turn = Image.Exif()
    quarter_turn[ExifTags.Base.Orientation] = 6
    for name, color in (("dark", "navy"), ("light", "wheat")):
        (labeled / name).mkdir(parents=True)
        (labeled / name / "notes.txt").write_text("This is skipped.")
        for number in range(5):
            Image.new("RGB", (64, 32), color).save(labeled / name / f"{number}.jpg", exif=quarter_turn)
    shapes = []
    run_session = onnxruntime.InferenceSession.run

    def spy(session: object, outputs: list[str], inputs: dict[str, np.ndarray]) -> object:
        shapes.append(inputs["images"].shape)
        return run_session(session, outputs, inputs)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", spy)
    given = ["--weights", str(dinov2), "--out", str(out), "--epochs", "2", "--batch", "3"]
    run(monkeypatch, "finetune_and_export.py", str(labeled), *given)
    assert (out / "encoder.onnx").is_file()
    assert shapes[-1][2] > shapes[-1][3]  # upright
    before, after = (Encoder.from_pretrained(folder) for folder in (dinov2, out / "encoder"))
    assert not torch.equal(before.network.prefix, after.network.prefix)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("epoch 2: ")
    assert lines[1].endswith(" of 2 held-out images are classified correctly")
    assert lines[-1].split()[-1] in ("dark", "light")
