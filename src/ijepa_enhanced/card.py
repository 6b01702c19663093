"""Model cards: the `README.md` of an encoder folder, written from what the encoder knows about itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ijepa_enhanced.models.preprocessing import Origin, Preprocessing, Record
from ijepa_enhanced.models.vit import VisionTransformer

LICENSES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
"""Common identifiers of the Hub (https://huggingface.co/docs/hub/repositories-licenses). A card names other licenses in
`license_name`, because the Hub refuses a `license` that is not in its list."""
STAMP = "\n<!-- Written by ijepa-enhanced, which keeps this file if you edit it: "
"""How the last line of a card begins. A digest of the text before it follows."""


def card(
    name: str, network: VisionTransformer, preprocessing: Preprocessing, origin: Origin | None, record: Record
) -> str:
    """Return the model card of an encoder, as Markdown with a YAML header.

    Args:
        name: its folder, or its id on the Hub.
        network, preprocessing, origin, record: of the encoder.
    """
    import yaml

    parts = [
        f"---\n{yaml.safe_dump(header(origin, record), sort_keys=False)}---",
        f"# {name}",
        "An image encoder. It accepts images of any size and shape, and keeps their aspect ratio.",
        f'```python\nfrom ijepa_enhanced import Encoder\n\nencoder = Encoder.from_pretrained("{name}")\n'
        f'features = encoder.embed(["photo.jpg"])  # [1, {network.width}]\n```',
        table(facts(network, preprocessing, origin)),
        *(training_section(record.training) if record.training else ()),
        *(("## Scores", record.scores["protocol"], table(record.scores["values"])) if record.scores else ()),
    ]
    text = "\n\n".join(parts) + "\n"
    return f"{text}{STAMP}{digest(text)} -->\n"


def digest(text: str) -> str:
    """Return a short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def edited_card(path: Path) -> str | None:
    """Return the card in a file if somebody edited it. None if the file is missing or still as `card` wrote it."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    written, _, stamp = text.rpartition(STAMP)
    return None if stamp == f"{digest(written)} -->\n" else text


def header(origin: Origin | None, record: Record) -> dict[str, Any]:
    """Return the metadata of a card (https://huggingface.co/docs/hub/model-cards)."""
    training = record.training or {}
    terms = (origin.license if origin else None) or training.get("teacher_license")
    found: dict[str, Any] = {"license": terms} if terms in LICENSES else {"license": "other", "license_name": terms}
    found = found if terms else {}
    found |= {"library_name": "ijepa-enhanced", "pipeline_tag": "image-feature-extraction"}
    trained_here = ["i-jepa", "self-supervised-learning"] if record.training or not origin else []
    found["tags"] = [*trained_here, "vision-transformer"]
    if datasets := training.get("datasets"):
        found["datasets"] = datasets
    if origin and "/" in origin.name:  # a Hub id, perhaps with a revision
        found["base_model"] = origin.name.partition("@")[0]
    return found


def facts(network: VisionTransformer, preprocessing: Preprocessing, origin: Origin | None) -> dict[str, Any]:
    """Return what people want to know about an encoder before they use it."""
    config, trained = network.config, preprocessing.resolution
    millions = sum(value.numel() for value in network.parameters()) / 1e6
    found = {
        "Architecture": f"Vision Transformer: width {config.width}, {config.depth} blocks, {config.heads} heads, "
        f"{millions:.1f} million parameters",
        "Patch size": f"{config.patch_size} px",
        "Resolution of training": f"{trained} px: square root of height x width" if trained else "native size",
        "Normalization": f"mean {list(preprocessing.mean)}, standard deviation {list(preprocessing.std)}, for pixel "
        "values on [0, 1]",
        "Feature of an image": {"mean": "mean of its patches", "cls": "class token"}[preprocessing.pooling],
    }
    if origin:
        found["Weights from"] = f"`{origin.name}` ({origin.layout}), license: {origin.license or 'unknown'}"
    return found


def training_section(training: Mapping[str, Any]) -> list[str]:
    """Return the parts of a card on the run that trained the encoder; see `Record.training`."""
    rows = {name: value for name, value in training.items() if value is not None}
    rows.pop("datasets", None)
    recipe = rows.pop("recipe", "")
    parts = ["## Training", table({name.replace("_", " ").capitalize(): value for name, value in rows.items()})]
    if recipe:
        parts.append("Settings that differ from the defaults, as a file for `ijepa train --config`:")
        parts.append(f"```yaml\n{recipe}```")
    return parts


def table(rows: Mapping[str, Any]) -> str:
    """Return a Markdown table of two columns; whole numbers get separators of thousands."""
    shown = (f"| {name} | {f'{value:,}' if isinstance(value, int) else value} |" for name, value in rows.items())
    return "\n".join(["| | |", "| --- | --- |", *shown])
