"""Tensors of a file, taken by name, with one error for all that do not fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.ops.preprocess import CHANNELS

LISTED = 5
"""Names that a message lists before it only counts."""


def is_state_dict(content: Any) -> bool:
    """Return whether an object is a dictionary of tensors by name."""
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


class Reader:
    """The tensors of a file.

    Args:
        tensors: by their names.
        renames: regular expressions and what replaces them in names, in this order.
        ignored: regular expressions of whole names, after renaming, that are known and not needed.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, str]] = (), ignored: Iterable[str] = ()
    ) -> None:
        self.left: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        """The names in the file of those that are left."""
        self.unknown: list[str] = []
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        patterns = [re.compile(pattern) for pattern in ignored]
        for name, value in tensors.items():
            new = name
            for pattern, replacement in renames:
                new = re.sub(pattern, replacement, new)
            if any(pattern.fullmatch(new) for pattern in patterns):
                continue
            if new in self.left:  # it is there twice, in an old and a new layout
                self.unknown.append(name)
            else:
                self.left[new], self.names[new] = value, name

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def peek(self, name: str, *dimensions: int) -> Tensor:
        """Return a tensor that says how large the network is, without taking it.

        Args:
            name: name of the tensor.
            dimensions: allowed numbers of dimensions.

        Raises:
            EncoderError: it is missing, or has another number of dimensions.
        """
        if name not in self.left:
            raise EncoderError(f"'{name}' is missing, so these are not weights of this kind.")
        found = self.left[name]
        if found.ndim not in dimensions:
            shape, allowed = list(found.shape), " or ".join(map(str, dimensions))
            raise EncoderError(f"'{self.names[name]}' is {shape}, but must have {allowed} dimensions.")
        return found

    def count(self, block: str) -> int:
        """Return the number of blocks, whose names start with `block`, formatted with a number."""
        start, end = block.split("{}")
        pattern = re.compile(re.escape(start) + r"(\d+)" + re.escape(end))
        numbers = [int(found[1]) for name in self.left if (found := pattern.match(name))]
        return max(numbers, default=-1) + 1

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a copy of a tensor, in float32. If it does not fit, return zeros, and let `finish` complain.

        A copy, because a tensor may be a part of a file, which may change.
        """
        found = self.left.pop(name, None)
        if found is None:
            self.missing.append(name)
        elif tuple(found.shape) != shape:
            self.misshapen.append(f"{self.names[name]} is {list(found.shape)}, not {list(shape)}")
        elif not found.is_floating_point():
            self.misshapen.append(f"{self.names[name]} is of type {str(found.dtype).removeprefix('torch.')}")
        else:
            return found.to(torch.float32, copy=True)
        return torch.zeros(()).expand(shape)  # without memory: a damaged config.json may ask for any size

    def take_linear(
        self, names: Sequence[str], rows: int, columns: int, unbiased: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Return the weight [rows, columns] and the bias [rows] of layers whose outputs are put together.

        Args:
            names: of the layers, each with the same number of rows.
            rows, columns: of the result.
            unbiased: ends of the names of layers without a bias: it is 0.
        """
        part = rows // len(names)
        weights = [self.take(f"{name}.weight", part, columns) for name in names]
        biases = [
            torch.zeros(part) if name.endswith(tuple(unbiased)) else self.take(f"{name}.bias", part) for name in names
        ]
        return {"weight": torch.cat(weights), "bias": torch.cat(biases)}

    def finish(self) -> None:
        """Raise EncoderError if a tensor was missing or did not fit, or if one is left."""
        unknown = self.unknown + [self.names[name] for name in self.left]
        problems = [
            f"{title}: {some(names)}"
            for title, names in (
                ("missing", self.missing),
                ("wrong shape or type", self.misshapen),
                ("unknown", unknown),
            )
            if names
        ]
        if problems:
            raise EncoderError(f"The weights do not fit: {'; '.join(problems)}.")


def some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


@dataclass(frozen=True)
class Names:
    """What a layout calls the parts of a Vision Transformer."""

    patches: str
    """The patch embedding."""
    block: str
    """How names of a block start, with {} for its number."""
    norm1: str
    qkv: tuple[str, ...]
    """One layer, or three."""
    proj: str
    scale1: str
    norm2: str
    fc1: tuple[str, ...]
    """One layer, or two whose outputs are the gates and the values of SwiGLU."""
    fc2: str
    scale2: str
    norm: str
    """The final LayerNorm."""


def take_trunk(reader: Reader, config: Architecture, names: Names, unbiased: Collection[str] = ()) -> dict[str, Tensor]:
    """Return all of a state dict of ours except prefix tokens and positions.

    Args:
        reader: of the file.
        config: the architecture.
        names: of the layout.
        unbiased: see `Reader.take_linear`.
    """
    width, hidden = config.width, config.hidden * (2 if config.gated else 1)
    found = {"patch_embed": take_patches(reader, names.patches, config)}
    for number in range(config.depth):
        block, ours = names.block.format(number), f"blocks.layers.{number}"
        for name, theirs in (("norm1", names.norm1), ("norm2", names.norm2)):
            found[f"{ours}.{name}"] = take_norm(reader, block + theirs, width)
        for name, layers, rows, columns in (
            ("qkv", names.qkv, 3 * width, width),
            ("proj", (names.proj,), width, width),
            ("fc1", names.fc1, hidden, width),
            ("fc2", (names.fc2,), width, config.hidden),
        ):
            found[f"{ours}.{name}"] = reader.take_linear([block + layer for layer in layers], rows, columns, unbiased)
        if config.layer_scale:
            found[ours] = {
                name: reader.take(block + theirs, width)
                for name, theirs in (("scale1", names.scale1), ("scale2", names.scale2))
            }
    found["blocks.norm"] = take_norm(reader, names.norm, width)
    return {f"{module}.{name}": value for module, values in found.items() for name, value in values.items()}


def take_patches(reader: Reader, name: str, config: Architecture) -> dict[str, Tensor]:
    """Return weight and bias of the patch embedding: a convolution, or a linear layer of channels-last patches."""
    side, width = config.patch_size, config.width
    if reader.peek(f"{name}.weight", 2, 4).ndim == 2:
        return reader.take_linear([name], width, side * side * CHANNELS)
    weight = reader.take(f"{name}.weight", width, CHANNELS, side, side)
    return {"weight": weight.permute(0, 2, 3, 1).flatten(1), "bias": reader.take(f"{name}.bias", width)}


def take_norm(reader: Reader, name: str, width: int) -> dict[str, Tensor]:
    """Return weight and bias of a LayerNorm."""
    return {part: reader.take(f"{name}.{part}", width) for part in ("weight", "bias")}
