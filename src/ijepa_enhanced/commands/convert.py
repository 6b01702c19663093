"""`ijepa convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ijepa_enhanced.commands.options import ConvertOptions
from ijepa_enhanced.commands.setup import print_counts, print_json
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import make_folder


def run(options: ConvertOptions) -> int:
    """Write released weights as a folder of ours, and print what they are."""
    folder = Path(options.out)
    if any((folder / name).exists() for name in ("config.json", "model.safetensors")):
        raise RequestError(f"{folder} already contains an encoder. Give another folder as OUT.")
    encoder = Encoder.from_pretrained(options.weights, options.encoder)
    make_folder(folder)
    encoder.save_pretrained(folder)
    print_counts(facts(encoder))
    values = {name: dataclasses.asdict(part) for name, part in parts(encoder).items()}
    print_json(options, values | {"out": str(folder)})
    return 0


def parts(encoder: Encoder) -> dict[str, Any]:
    """Return the parts of the config.json of an encoder, except an origin that it does not have."""
    found = {"architecture": encoder.config, "preprocessing": encoder.preprocessing}
    return found | ({"origin": encoder.origin} if encoder.origin else {})


def facts(encoder: Encoder) -> dict[str, Any]:
    """Return what people want to know about weights that they load."""
    config, origin = encoder.config, encoder.origin
    millions = sum(value.numel() for value in encoder.network.parameters()) / 1e6
    found: dict[str, Any] = {}
    if origin is not None:
        found = {"weights": f"{origin.name} ({origin.layout})"}
        if origin.encoder:
            found["encoder"] = origin.encoder
        found["license"] = origin.license or "unknown: see where the weights come from"
    return found | {
        "parameters": f"{millions:.1f} million",
        "width, depth, heads": f"{config.width}, {config.depth}, {config.heads}",
        "patch size": f"{config.patch_size} px",
        "positions": f"{config.positions}, {config.resampling}" if config.positions != "rope" else "rope",
        "class token, registers": f"{int(config.class_token)}, {config.registers}",
        "trained resolution": f"{trained} px" if (trained := encoder.preprocessing.resolution) else "native",
        "pooling": encoder.preprocessing.pooling,
    }
