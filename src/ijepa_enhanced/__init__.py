"""Self-supervised image encoders from images of any size (I-JEPA on a packed stream)."""

from ijepa_enhanced.models.encoder import Encoder

__all__ = ["Encoder"]
__version__ = "0.1.0"
