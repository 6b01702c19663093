"""Model cards: what they say, that it is true, and that nobody's words are lost."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ijepa_enhanced.encoder import Encoder, hash_weights
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing, Record

TRAINING = {
    "source": "hf://me/cats",
    "images": 12345,
    "steps": 6000,
    "images_seen": 1234567,
    "initial_weights": None,
    "datasets": ["me/cats"],
    "recipe": "data.max_resolution: 48\nsteps: 6000\n",
}


def tiny(origin: Origin | None = None, **preprocessing: Any) -> Encoder:
    architecture = EncoderConfig("Ti", 8, 1, max_grid=8).architecture
    architecture = dataclasses.replace(architecture, class_token=preprocessing.get("pooling") == "cls")
    encoder = Encoder.random(architecture, Preprocessing(**preprocessing), 0)
    encoder.origin = origin
    return encoder


def card_of(encoder: Encoder, folder: Path) -> tuple[dict[str, Any], str]:
    """Header and text of the card that is saved with an encoder."""
    encoder.save_pretrained(folder)
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_card_tells_how_to_use_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = tiny(resolution=48, pooling="cls", mean=(0.1, 0.2, 0.3))
    header, text = card_of(encoder, Path("weights/pets"))
    assert header == {
        "library_name": "ijepa-enhanced",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["i-jepa", "self-supervised-learning", "vision-transformer"],
    }
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", text, re.MULTILINE))
    assert rows == {
        "Architecture": "Vision Transformer: width 192, 1 blocks, 3 heads, 0.5 million parameters",
        "Patch size": "8 px",
        "Resolution of training": "48 px: square root of height x width",
        "Normalization": "mean [0.1, 0.2, 0.3], standard deviation [0.229, 0.224, 0.225], for pixel values on [0, 1]",
        "Feature of an image": "class token",
    }
    Image.new("RGB", (50, 40)).save("photo.jpg")
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], found)  # the lines that users copy
    assert torch.equal(found["features"], encoder.embed(["photo.jpg"]))
    _, text = card_of(tiny(), Path("other"))
    assert "| Resolution of training | native size |" in text
    assert "| Feature of an image | mean of its patches |" in text


def test_a_card_of_imported_weights_does_not_say_how_they_were_trained(tmp_path: Path) -> None:
    header, _ = card_of(tiny(Origin("vit", "transformers vit")), tmp_path)
    assert header["tags"] == ["vision-transformer"]


def test_a_card_tells_of_the_run_and_the_scores(tmp_path: Path) -> None:
    encoder = tiny()
    scores = {"protocol": "Scored on cats.", "values": {"kNN-20": "70.0%"}, "weights": hash_weights(encoder)}
    encoder.record = Record(TRAINING, scores)
    header, text = card_of(encoder, tmp_path / "a")
    assert header["datasets"] == ["me/cats"]
    for line in ("| Source | hf://me/cats |", "| Images seen | 1,234,567 |", "| kNN-20 | 70.0% |", "Scored on cats."):
        assert f"\n{line}\n" in text
    assert "Initial weights" not in text
    assert f"```yaml\n{TRAINING['recipe']}```\n" in text
    # They stay with the encoder, and scores as long as it is the one that was scored.
    loaded = Encoder.from_pretrained(tmp_path / "a")
    assert loaded.record == encoder.record
    assert card_of(loaded, tmp_path / "b" / "a") == (header, text)
    with torch.no_grad():
        loaded.network.blocks.norm.bias += 1
    header, text = card_of(loaded, tmp_path / "a")
    assert "1,234,567" in text
    assert "Scores" not in text
    assert Encoder.from_pretrained(tmp_path / "a").record == Record(TRAINING)


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            Origin("facebook/ijepa", "I-JEPA", "cc-by-nc-4.0"),
            {"license": "cc-by-nc-4.0", "base_model": "facebook/ijepa"},
        ),
        (
            Origin("facebook/dinov3@v1", "transformers dinov3_vit", "dinov3-license"),
            {"license": "other", "license_name": "dinov3-license", "base_model": "facebook/dinov3"},
        ),
        (Origin("IN1K.pth.tar", "I-JEPA", "mit"), {"license": "mit"}),
        (Origin("me/cats", "ijepa-enhanced"), {"base_model": "me/cats"}),
    ],
)
def test_a_card_names_license_and_base_model(origin: Origin, expected: dict[str, str], tmp_path: Path) -> None:
    header, text = card_of(tiny(origin), tmp_path)
    found = {name: header[name] for name in ("license", "license_name", "base_model") if name in header}
    assert found == expected
    assert f"| Weights from | `{origin.name}` ({origin.layout}), license: {origin.license or 'unknown'} |" in text


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: "",
        lambda card: "Cats and dogs.\n",
        lambda card: card + "More words.\n",
        lambda card: card.replace("image encoder", "cat encoder"),
    ],
    ids=["empty", "another text", "longer", "a word"],
)
def test_a_card_that_somebody_edited_is_never_overwritten(edit: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    tiny().save_pretrained(tmp_path)
    licensed = tiny(Origin("a", "b", "mit"))
    licensed.save_pretrained(tmp_path)
    assert "license: mit" in path.read_text()  # as it was written by us, it was written again
    written = edit(path.read_text())
    path.write_text(written)
    tiny().save_pretrained(tmp_path)
    assert path.read_text() == written
    # It goes where the encoder goes.
    Encoder.from_pretrained(tmp_path).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == written


def test_a_card_does_not_tell_where_it_was_written(tmp_path: Path) -> None:
    _, text = card_of(tiny(), tmp_path / "pets")
    assert 'from_pretrained("pets")' in text
    assert str(tmp_path) not in text
