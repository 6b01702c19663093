"""Which layout weights are in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.convert import hf_dinov2, hf_dinov3, hf_vit, ijepa_checkpoint, timm_naflex, timm_vit
from ijepa_enhanced.models.convert.imported import Config, Imported
from ijepa_enhanced.models.convert.reader import is_state_dict

TRANSFORMERS = {
    "ijepa": hf_vit.convert,
    "vit": hf_vit.convert,
    "dinov2": hf_dinov2.convert,
    "dinov2_with_registers": hf_dinov2.convert,
    "dinov3_vit": hf_dinov3.convert,
}
"""By the `model_type` in config.json."""


def is_foreign(config: Any) -> bool:
    """Return whether the content of a config.json is that of transformers or timm."""
    return isinstance(config, Mapping) and ("model_type" in config or isinstance(config.get("architecture"), str))


def convert(
    content: Any,
    config: Mapping[str, Any] | None,
    processor: Mapping[str, Any],
    encoder: Literal["target", "context"] = "target",
) -> Imported:
    """Convert weights.

    Args:
        content: of the file with the weights.
        config: the content of the config.json beside it, see `is_foreign`; None: there is none.
        processor: the content of the preprocessor_config.json beside it, empty if there is none.
        encoder: which encoder of an I-JEPA checkpoint.

    Raises:
        EncoderError: they are in no layout that is known, or something does not fit.
    """
    if ijepa_checkpoint.is_checkpoint(content):
        return ijepa_checkpoint.convert(content, encoder)
    if encoder == "context":
        raise EncoderError("Only checkpoints of I-JEPA's own code have a context encoder.")
    if config is None:
        raise EncoderError(
            "There is no config.json beside the file, and it is no checkpoint of I-JEPA's own code, which has "
            "'target_encoder' in it. Put the config.json of transformers or timm beside it (docs/weights.md)."
        )
    if not is_state_dict(content):
        raise EncoderError("The file is not a state dict, which is a dictionary of tensors.")
    if "model_type" not in config:
        kind = timm_naflex if "embeds.proj.weight" in content else timm_vit
        return kind.convert(content, Config(config))
    layout = TRANSFORMERS.get(str(config["model_type"]))
    if layout is None:
        raise EncoderError(
            f"model_type is '{config['model_type']}' in config.json, but only {', '.join(TRANSFORMERS)} can be loaded."
        )
    return layout(content, Config(config), Config(processor, "preprocessor_config.json"))
