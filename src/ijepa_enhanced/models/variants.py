"""Sizes of the Vision Transformer, by their usual names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One size of Vision Transformer."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


VARIANTS = {
    "Ti": Variant(192, 12, 3),  # DeiT, arXiv 2012.12877, table 1
    "S": Variant(384, 12, 6),  # DeiT, arXiv 2012.12877, table 1
    "B": Variant(768, 12, 12),  # ViT, arXiv 2010.11929, table 1
    "L": Variant(1024, 24, 16),  # ViT, arXiv 2010.11929, table 1
    "H": Variant(1280, 32, 16),  # ViT, arXiv 2010.11929, table 1
    "g": Variant(1408, 40, 16, 48 / 11),  # Scaling Vision Transformers, arXiv 2106.04560, table 2: MLP 6144
}
PATCH_SIZES = (8, 14, 16)


def variant_name(width: int) -> str:
    """Return the name of the variant of a width, or the width if there is none."""
    return next((name for name, variant in VARIANTS.items() if variant.width == width), str(width))
