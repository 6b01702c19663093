"""Other networks for images of mixed sizes, with our widths and random weights, each used as its package intends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_enhanced.data.decode import patchify
from ijepa_enhanced.encoder import CPU_TOKENS, TOKENS_PER_PACK
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.ops.preprocess import IMAGENET_MEAN, IMAGENET_STD

TOKENS = {"cpu": CPU_TOKENS, "cuda": TOKENS_PER_PACK}
"""Tokens of a padded batch: as many as of a pack of ours."""

Images = Sequence[NDArray[np.uint8]]
"""N arrays [height, width, 3] of whole patches on both axes."""
Embed = Callable[[], Tensor]
"""Returns one feature an image: [N, D]."""


def timm_naflexvit(config: Architecture, images: Images, device: torch.device) -> Embed:
    """Use timm's own collator, which pads all images to the longest."""
    naflexvit, dataset = (import_module(f"timm.{name}") for name in ("models.naflexvit", "data.naflex_dataset"))
    side = config.patch_size
    cfg = naflexvit.NaFlexVitCfg(
        patch_size=side,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.hidden / config.width,
        pos_embed="factorized",
        pos_embed_grid_size=config.position_grid,
        global_pool="avg",
    )
    network = naflexvit.NaFlexVit(cfg, num_classes=0).eval().to(device)
    samples = []
    for image in images:
        rows, cols = image.shape[0] // side, image.shape[1] // side
        patches = patchify(image, side).astype(np.float32).reshape(rows * cols, -1, 3)
        places = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
        sample = {
            "patches": torch.from_numpy((patches / 255 - IMAGENET_MEAN) / IMAGENET_STD).float().flatten(1),
            "patch_coord": torch.from_numpy(places),
            "patch_valid": torch.ones(rows * cols, dtype=torch.bool),
        }
        samples.append((sample, 0))
    longest = max(len(sample["patches"]) for sample, _ in samples)
    collate = dataset.NaFlexCollator(max_seq_len=longest)
    size = max(1, TOKENS[device.type] // longest)
    batches = [
        {name: x.to(device) for name, x in collate(samples[start : start + size])[0].items() if torch.is_tensor(x)}
        for start in range(0, len(samples), size)
    ]
    return lambda: torch.cat([network(batch) for batch in batches])


def vit_pytorch_navit(config: Architecture, images: Images, device: torch.device) -> Embed:
    """Use its own grouping into rows of at most 2,048 tokens (its default)."""
    na_vit = import_module("vit_pytorch.na_vit")
    side = config.patch_size
    network = na_vit.NaViT(
        image_size=max(max(image.shape[:2]) for image in images),
        patch_size=side,
        num_classes=config.width,
        dim=config.width,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.width // config.heads,
        mlp_dim=config.hidden,
    )
    network.mlp_head = nn.Identity()
    network.eval().to(device)
    tensors = [normalized(image, device) for image in images]
    return lambda: network(tensors, group_images=True)


def transformers_ijepa(config: Architecture, images: Images, device: torch.device) -> Embed:
    """Embed one image after another, with interpolated positions: a batch has one size."""
    transformers = import_module("transformers")
    side = config.patch_size
    network = transformers.IJepaModel(
        transformers.IJepaConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            image_size=side * (224 // side),
            patch_size=side,
        )
    )
    network.eval().to(device)
    tensors = [normalized(image, device)[None] for image in images]
    return lambda: torch.cat(
        [network(image, interpolate_pos_encoding=True).last_hidden_state.mean(dim=1) for image in tensors]
    )


PEERS = {
    "timm NaFlexViT": timm_naflexvit,
    "vit_pytorch NaViT": vit_pytorch_navit,
    "transformers IJepaModel": transformers_ijepa,
}
"""By the name of the package and of the network."""


def normalized(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return pixels [h, w, 3] as float32 [3, h, w], normalized."""
    pixels = (torch.from_numpy(image) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return pixels.permute(2, 0, 1).contiguous().to(device)
