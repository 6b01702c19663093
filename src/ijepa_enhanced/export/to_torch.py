"""An encoder as a file of `torch.export`, which PyTorch runs without this package."""

from __future__ import annotations

from pathlib import Path

import torch

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.export.program import Shape, check, quiet, trace
from ijepa_enhanced.files import replacing


def export(encoder: Encoder, path: Path, shape: Shape) -> float:
    """Write a file, check it, and return its largest relative difference from the encoder.

    Raises:
        RunError: the file computes other features.
        OSError: it cannot be written.
    """
    program = trace(encoder, shape)
    with replacing(path, new=True) as temporary:
        with temporary.open("wb") as file:  # given a path, PyTorch wants it to end in .pt2
            torch.export.save(program, file)
        with temporary.open("rb") as file, quiet():
            module = torch.export.load(file).module()
        return check(encoder, shape, lambda images: module(torch.from_numpy(images)), "The exported program")
