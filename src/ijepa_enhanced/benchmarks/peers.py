"""Other networks for images of mixed sizes, with the weights of an encoder of ours, each used as its package intends.

They compute the features that our encoder computes, up to rounding. Only their position embeddings are not their own:
timm stretches its tables over every grid, and transformers interpolates a square table, while our encoder was trained
with positions that small grids share with large ones. Both get our positions, computed as they go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.data.decode import patchify
from ijepa_enhanced.devices import kind_of
from ijepa_enhanced.encoder import CPU_TOKENS, TOKENS_PER_PACK, Encoder
from ijepa_enhanced.models.blocks import LAYER_NORM_EPS
from ijepa_enhanced.ops.positions import within_grid
from ijepa_enhanced.packed import Packed, Segments

TOKENS = {"cpu": CPU_TOKENS, "gpu": TOKENS_PER_PACK}
"""Tokens of a batch: as many as of a pack of ours."""

Images = Sequence[NDArray[np.uint8]]
"""N arrays [height, width, 3] of whole patches on both axes."""
Embed = Callable[[], Tensor]
"""Returns one feature an image: [N, D]."""
Prepare = Callable[[Images], Embed]
"""Moves images to the device, batched and normalized, and returns what embeds them."""

TIMM = (
    *((".qkv.", ".attn.qkv."), (".proj.", ".attn.proj."), (".fc", ".mlp.fc")),
    *(("blocks.norm.", "norm."), ("blocks.layers.", "blocks."), ("patch_embed.", "embeds.proj.")),
)
"""Parts of names of our weights, and of timm's."""
TRANSFORMERS = (
    *((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".fc", ".mlp.fc")),
    *((".proj.", ".attention.o_proj."), ("blocks.norm.", "layernorm."), ("blocks.layers.", "layers.")),
    ("patch_embed.", "embeddings.patch_embeddings.projection."),
)
"""Parts of names of our weights, and of those of transformers 5.24, except for `qkv`."""


def timm_naflexvit(encoder: Encoder) -> Prepare:
    """Use timm's own collator, which pads all images to the longest."""
    naflexvit, dataset = (import_module(f"timm.{name}") for name in ("models.naflexvit", "data.naflex_dataset"))
    config, device = encoder.config, encoder.device
    side = config.patch_size
    cfg = naflexvit.NaFlexVitCfg(
        patch_size=side,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.hidden / config.width,
        pos_embed="none",
        global_pool="avg",
        fc_norm=False,  # the norm comes before the mean, as in ours
    )
    network = naflexvit.NaFlexVit(cfg, num_classes=0).eval()
    network.load_state_dict(renamed(encoder, TIMM))
    network.to(device)

    def add_positions(module: Any, args: Any, kwargs: dict[str, Tensor], found: tuple[Tensor, Any]) -> Any:
        return found[0] + positions_of(encoder, kwargs["patch_coord"]), found[1]

    network.embeds.register_forward_hook(add_positions, with_kwargs=True)

    def prepare(images: Images) -> Embed:
        samples = []
        for image in images:
            rows, cols = image.shape[0] // side, image.shape[1] // side
            patches = patchify(image, side).astype(np.float32).reshape(rows * cols, -1, 3)
            places = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
            sample = {
                "patches": torch.from_numpy(normalized(patches, encoder)).flatten(1),
                "patch_coord": torch.from_numpy(places),
                "patch_valid": torch.ones(rows * cols, dtype=torch.bool),
            }
            samples.append((sample, 0))
        longest = max(len(sample["patches"]) for sample, _ in samples)
        collate = dataset.NaFlexCollator(max_seq_len=longest)
        size = max(1, TOKENS[kind_of(device)] // longest)
        batches = [
            {name: x.to(device) for name, x in collate(samples[start : start + size])[0].items() if torch.is_tensor(x)}
            for start in range(0, len(samples), size)
        ]
        return lambda: torch.cat([network(batch) for batch in batches])

    return prepare


def transformers_ijepa(encoder: Encoder, tokens: int = 1) -> Prepare:
    """Embed batches of images of one size, of at most `tokens` tokens; by default one image after another."""
    transformers = import_module("transformers")
    config, device = encoder.config, encoder.device
    side = config.patch_size
    network = transformers.IJepaModel(
        transformers.IJepaConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            layer_norm_eps=LAYER_NORM_EPS,
            image_size=side,
            patch_size=side,
        ),
        add_pooling_layer=False,
    )
    weights = {"embeddings.position_embeddings": network.embeddings.position_embeddings}  # not used
    for name, value in renamed(encoder, TRANSFORMERS).items():
        if ".qkv." in name:
            parts = zip(("q", "k", "v"), value.chunk(3), strict=True)
            weights |= {name.replace("qkv", f"attention.{part}_proj"): weight for part, weight in parts}
        else:
            weights[name] = value
    patches = "embeddings.patch_embeddings.projection.weight"
    weights[patches] = weights[patches].unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)  # [D, C, P, P]
    network.load_state_dict(weights)
    network.eval().to(device)

    def positions(embeddings: Tensor, height: int, width: int) -> Tensor:
        grid = torch.cartesian_prod(torch.arange(height // side), torch.arange(width // side)).view(1, -1, 2)
        return positions_of(encoder, grid.to(device))

    network.embeddings.interpolate_pos_encoding = positions

    def prepare(images: Images) -> Embed:
        batches = batches_of(images, encoder, tokens)
        return lambda: torch.cat(
            [network(batch, interpolate_pos_encoding=True).last_hidden_state.mean(dim=1) for batch in batches]
        )

    return prepare


def transformers_model(encoder: Encoder, folder: str, tokens: int = 1) -> Prepare:
    """Embed with the model that transformers itself loads from `folder`, whose weights `encoder` has.

    Batches are those of `transformers_ijepa`. The model interpolates its positions in its own way.
    """
    network = import_module("transformers").AutoModel.from_pretrained(folder).eval().to(encoder.device)
    # The others always interpolate, or need not.
    options = {"interpolate_pos_encoding": True} if network.config.model_type in ("vit", "ijepa") else {}
    pooled = slice(0, 1) if encoder.preprocessing.pooling == "cls" else slice(encoder.config.prefix, None)

    def prepare(images: Images) -> Embed:
        batches = batches_of(images, encoder, tokens)
        return lambda: torch.cat(
            [network(batch, **options).last_hidden_state[:, pooled].mean(dim=1) for batch in batches]
        )

    return prepare


def batches_of(images: Images, encoder: Encoder, tokens: int) -> list[Tensor]:
    """Return images of one size, or single ones, as normalized batches [B, 3, height, width] of at most `tokens`."""
    size = max(1, tokens // (images[0].shape[0] * images[0].shape[1] // encoder.config.patch_size**2))
    pixels = [torch.from_numpy(normalized(image, encoder)).permute(2, 0, 1) for image in images]
    return [
        torch.stack(pixels[start : start + size]).contiguous().to(encoder.device)
        for start in range(0, len(pixels), size)
    ]


PEERS: dict[str, Callable[[Encoder], Prepare]] = {
    "timm NaFlexViT": timm_naflexvit,
    "transformers IJepaModel": transformers_ijepa,
}
"""By the name of the package and of the network."""


def renamed(encoder: Encoder, names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the weights of the network without its positions, with each of `names` replaced in their names."""
    weights = {}
    for name, value in encoder.network.state_dict().items():
        if not name.startswith("positions."):
            for ours, theirs in names:
                name = name.replace(ours, theirs)
            weights[name] = value
    return weights


def positions_of(encoder: Encoder, coordinates: Tensor) -> Tensor:
    """Return our position embedding of padded grids: [B, N, 2] rows and columns, 0 where padded -> [B, N, D]."""
    count, longest = coordinates.shape[:2]
    flat = coordinates.flatten(0, 1)
    segments = Segments.of([longest] * count).to(coordinates.device)
    packed = Packed(flat, flat, coordinates.amax(dim=1) + 1, segments)
    if encoder.preprocessing.trained_grid is not None:
        packed = within_grid(packed, encoder.preprocessing.trained_grid)
    assert encoder.network.positions is not None
    embedding: Tensor = encoder.network.positions(packed.positions, packed.grids, segments.cu_seqlens)
    return embedding.unflatten(0, (count, longest))


def normalized(pixels: NDArray[np.number], encoder: Encoder) -> NDArray[np.float32]:
    """Return pixels [..., 3] on 0 to 255 as the network expects them, in float32."""
    mean, std = np.array(encoder.preprocessing.mean), np.array(encoder.preprocessing.std)
    scaled: NDArray[np.float32] = ((pixels / 255 - mean) / std).astype(np.float32)
    return scaled
