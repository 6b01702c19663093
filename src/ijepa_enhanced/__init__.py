"""Self-supervised image encoders from images of any size (I-JEPA on a packed stream)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa_enhanced.encoder import Encoder

__all__ = ["Encoder"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `Encoder` when it is first asked for: it brings torch along, which `ijepa --help` does not need."""
    if name == "Encoder":
        from ijepa_enhanced.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
