"""The encoder: a Vision Transformer over a packed stream of patches, and its Python face."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ijepa_enhanced.data.images import UnreadableImage, decode_views, open_image, patchify, upright_size
from ijepa_enhanced.data.plan import fit_grids
from ijepa_enhanced.devices import autocast, autocast_dtype
from ijepa_enhanced.files import replacing
from ijepa_enhanced.merge_plan import MergePlan, plan_merges
from ijepa_enhanced.models.blocks import Blocks, FactorizedPositions, SinCosPositions, init_weights
from ijepa_enhanced.models.variants import PATCH_SIZES, VARIANTS, Variant
from ijepa_enhanced.ops.linear import Linear, spare_rows
from ijepa_enhanced.ops.merging import Merge, chain, unmerge
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.packed import Packed, Segments

CHANNELS = 3
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""ImageNet's statistics on [0, 1], the field's convention, so that imported weights see what they were trained on."""

PATCH_MLP_RATIO = 2
"""Width of the hidden layer of a patch embedding over D, the only one measured (docs/recipe.md)."""

CPU_TOKENS = 4096
"""Tokens of a pack on a CPU, or those of one image if it has more: two tenths faster than with 16,384, though a tenth
slower where much is merged in bfloat16 (docs/log.md)."""

ImageLike = Image.Image | NDArray[np.uint8] | str | Path
"""A PIL image, an RGB array uint8 [height, width, 3], or the path of a file."""


@dataclass(frozen=True)
class EncoderConfig:
    """What defines an encoder's architecture."""

    variant: str = "S"
    """Width, depth, heads by name: Ti, S, B, L, H or g."""
    patch_size: int = 16
    """Side of a square patch in pixels: 8, 14 or 16."""
    depth: int | None = None
    """Number of blocks, if not the variant's: for studies on small machines."""
    positions: Literal["factorized", "sincos"] = "factorized"
    """Factorized learnable tables (NaViT), or the fixed 2-D sine-cosine of I-JEPA's released weights."""
    max_grid: int = 32
    """Entries of each axis's position table. Longer grids are interpolated onto it: set it near the longest
    side, in patches, of the training views."""
    patch_embed: Literal["linear", "mlp"] = "linear"
    """What makes a token of a patch: one linear layer, as in I-JEPA's released weights, or two with GELU between them,
    which learned more of photographs in every run (docs/recipe.md)."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"encoder.variant must be one of {', '.join(VARIANTS)}, not '{self.variant}'.")
        if self.patch_size not in PATCH_SIZES:
            raise ValueError(f"encoder.patch_size must be 8, 14 or 16, not {self.patch_size}.")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"encoder.depth must be at least 1, not {self.depth}.")
        for name, choices in (("positions", ("factorized", "sincos")), ("patch_embed", ("linear", "mlp"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"encoder.{name} must be {' or '.join(choices)}, not '{getattr(self, name)}'.")
        if self.max_grid < 1:
            raise ValueError(f"encoder.max_grid must be at least 1, not {self.max_grid}.")

    @property
    def shape(self) -> Variant:
        """The variant with its depth as configured."""
        variant = VARIANTS[self.variant]
        return dataclasses.replace(variant, depth=self.depth or variant.depth)


class PatchMLP(nn.Module):
    """A patch embedding with a hidden layer.

    Args:
        pixels: values of a patch.
        width: D.
    """

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(pixels, PATCH_MLP_RATIO * width)
        self.out = Linear(PATCH_MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[T, P * P * C] -> [T, D]."""
        return self.out(self.hidden(x, gelu=True))


class Encoder(nn.Module):
    """A Vision Transformer (arXiv 2010.11929) without class token that reads a packed stream of uint8 patches."""

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        pixels = config.patch_size**2
        std = torch.tensor(PIXEL_STD)
        self.register_buffer("pixel_scale", (1 / (255 * std)).repeat(pixels), persistent=False)
        self.register_buffer("pixel_shift", (-torch.tensor(PIXEL_MEAN) / std).repeat(pixels), persistent=False)
        embedding = Linear if config.patch_embed == "linear" else PatchMLP
        self.patch_embed = embedding(pixels * CHANNELS, shape.width)
        positions = FactorizedPositions if config.positions == "factorized" else SinCosPositions
        self.positions = positions(shape.width, config.max_grid)
        self.blocks = Blocks(shape.width, shape.depth, shape.heads, shape.mlp_ratio)
        init_weights(self)
        if isinstance(self.patch_embed, PatchMLP):
            # He's (arXiv 1502.01852): with deviations of 0.02 it would start where GELU is nearly linear.
            nn.init.kaiming_normal_(self.patch_embed.hidden.weight, nonlinearity="relu")

    @property
    def width(self) -> int:
        """D, the width of a feature."""
        return self.config.shape.width

    def forward(self, packed: Packed, plan: MergePlan | None = None) -> Tensor:
        """uint8 patches [T, P * P * C] -> features [T, D] after the last LayerNorm.

        With a plan tokens are merged on the way. Each patch then gets the feature of the token that holds it, so that
        a mean over patches weighs tokens by their sizes, and targets, maps and pooling are the same code as without.
        """
        features, merges = self.merged(packed, plan)
        return unmerge(features, reduce(chain, merges)) if merges else features

    def merged(self, packed: Packed, plan: MergePlan | None) -> tuple[Tensor, list[Merge]]:
        """The features [T', D] of what the patches were merged into, and the merges, layer after layer."""
        x = self.patch_embed(spare_rows(packed.values) * self.pixel_scale + self.pixel_shift)[: len(packed.values)]
        x = x + self.positions(packed.positions, packed.grids, packed.segments.cu_seqlens)
        return self.blocks(x, packed.segments, plan)

    def embed(
        self,
        images: Iterable[ImageLike],
        side: int | None = 224,
        merge_rate: float | Sequence[float] = 0.0,
        tokens_per_pack: int = 16384,
    ) -> Tensor:
        """One feature an image: the mean of its tokens.

        Matrix products are in float32 on a CPU, unless `torch.autocast` says otherwise, and in bfloat16 on a GPU that
        has it.

        Args:
            images: N images of any mix of sizes, one after another: a generator need not hold more than one; packed
                inside, so no image costs another padding.
            side: sqrt(height * width) in pixels after resizing, aspect ratio kept; None is native size.
            merge_rate: the share of its tokens that each layer merges into others, from 0 to 0.5, or one for each
                layer: faster, and less exact (docs/merging.md has the figures).
            tokens_per_pack: most tokens of an image, and in memory at once; lower it when memory is short. A CPU takes
                at most 4,096 at once, or one image.

        Returns:
            float32 [N, D] on the encoder's device.

        Raises:
            UnreadableImage: an image cannot be decoded; the message says which, where it is a path, and why.
            OSError: a file cannot be read.
            TypeError: what is no image, or one alone and not in a list.
            ValueError: a merge rate or a side out of range.
        """
        pooled = [
            segment_mean(features, packed.segments.cu_seqlens)
            for packed, features in self._features(images, side, merge_rate, tokens_per_pack)
        ]
        return torch.cat(pooled) if pooled else torch.empty(0, self.width, device=self.pixel_scale.device)

    def feature_maps(
        self,
        images: Iterable[ImageLike],
        side: int | None = 224,
        merge_rate: float | Sequence[float] = 0.0,
        tokens_per_pack: int = 16384,
    ) -> list[Tensor]:
        """Each image's features in their places: N tensors [rows, columns, D]; arguments as for `embed`."""
        maps: list[Tensor] = []
        for packed, features in self._features(images, side, merge_rate, tokens_per_pack):
            views = torch.split(features, list(packed.segments.lengths))
            maps += [view.view(*grid, self.width) for view, grid in zip(views, packed.grids.tolist(), strict=True)]
        return maps

    @torch.inference_mode()
    def _features(
        self,
        images: Iterable[ImageLike],
        side: int | None,
        merge_rate: float | Sequence[float],
        tokens_per_pack: int,
    ) -> Iterator[tuple[Packed, Tensor]]:
        device = self.pixel_scale.device
        # On a GPU ragged streams have no kernel in float32 (ops/attention.py).
        half = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        products = autocast(device, autocast_dtype("auto", device)) if half else nullcontext()
        for packed in self.packs(images, side, tokens_per_pack):
            plan = self.merge_plan(packed.segments, merge_rate)
            moved = packed.to(device)
            with products:
                features = self(moved, plan and plan.to(device))
            yield moved, features.float()

    def packs(self, images: Iterable[ImageLike], side: int | None, tokens_per_pack: int = 16384) -> Iterator[Packed]:
        """What `embed` shows the network: packs of uint8 patches, on the CPU; arguments and errors are its own."""
        if isinstance(images, (str, Path, Image.Image)):
            raise TypeError("One image alone: put it into a list.")
        if side is not None and side < 1:
            raise ValueError(f"side must be at least 1, not {side}.")
        patch_size = self.config.patch_size
        budget = self.at_once(tokens_per_pack)
        grids: list[NDArray[np.int64]] = []
        patches: list[NDArray[np.uint8]] = []
        tokens = 0
        for image in images:
            try:
                opened = _open(image)
                size = np.array([upright_size(opened)])
                grid = fit_grids(size[:, 0], size[:, 1], side, patch_size, limit=tokens_per_pack)
                (view,) = decode_views(opened, np.concatenate([0 * size, size], axis=1), grid * patch_size)
            except UnreadableImage as error:
                place = f"{image}: " if isinstance(image, (str, Path)) else ""
                raise UnreadableImage(f"{place}{error}") from error
            if tokens + grid.prod() > budget and patches:
                yield Packed.of_grids(np.concatenate(patches), np.concatenate(grids))
                grids, patches, tokens = [], [], 0
            grids.append(grid)
            patches.append(patchify(view, patch_size))
            tokens += int(grid.prod())
        if patches:
            yield Packed.of_grids(np.concatenate(patches), np.concatenate(grids))

    def at_once(self, tokens: int) -> int:
        """Of so many tokens that fit into memory, how many to compute at once: on a CPU at most `CPU_TOKENS`."""
        return min(tokens, CPU_TOKENS) if self.pixel_scale.device.type == "cpu" else tokens

    def merge_plan(self, segments: Segments, rate: float | Sequence[float]) -> MergePlan | None:
        """What merging at `rate` does to views of these lengths, on the CPU; None where it does nothing."""
        return plan_merges(segments.lengths, rate, self.config.shape.depth)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)
        with replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Encoder:
        """The encoder of a run's folder, or of a folder written by `save_pretrained`; in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: there is no encoder in that folder.
        """
        from safetensors.torch import load_file

        folder = Path(path)
        if (folder / "encoder").is_dir():
            folder = folder / "encoder"
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"No encoder in {path}: expected config.json and model.safetensors there or in its folder 'encoder'."
            )
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        encoder = cls(EncoderConfig(**config))
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
        return encoder.eval()


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != CHANNELS:
            raise TypeError(f"An array must be uint8 [height, width, 3], not {image.dtype} {[*image.shape]}.")
        return Image.fromarray(image)
    if not isinstance(image, (str, Path)):
        raise TypeError(f"An image is a PIL image, an array or a path, not {type(image).__name__}.")
    return open_image(Path(image).read_bytes())
