"""How many images of mixed sizes a second are embedded: `python -m ijepa_enhanced.benchmarks.embed --source SOURCE`.

It compares ours, at several merge rates, with other networks of the same size that are installed: timm's NaFlexViT on
padded batches, vit-pytorch's NaViT on rows of its own grouping, transformers' IJepaModel on one image after another.
Weights are random. All read the same pixels, which are resized, batched and on the device beforehand, and normalized
where the network does not do that itself. So the time is that of the network alone, in one precision of autocast.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_enhanced.benchmarks.ceilings import matrix_products
from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import decode_views, patchify, upright_size
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype, best_device
from ijepa_enhanced.encoder import CPU_TOKENS, Encoder, Preprocessing
from ijepa_enhanced.evaluate.cost import seconds_by_turns
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.ops.preprocess import IMAGENET_MEAN, IMAGENET_STD

TURNS = 3
IMAGES = {"cpu": 16, "cuda": 256}
SCALE, MOST_TOKENS = 2, 1024
"""Images are shown at twice their size, so that those of small data sets are as large and as mixed as photographs."""
TOKENS = {"cpu": CPU_TOKENS, "cuda": 16384}
"""Tokens of a padded batch, and of a pack of ours."""
RATES = (0.0, 0.05, 0.12)

Images = Sequence[NDArray[np.uint8]]
"""N arrays [height, width, 3] of whole patches on both axes."""
Embed = Callable[[], Tensor]
"""Returns one feature an image: [N, D]."""


def run(
    source: str = "synthetic", csv: bool = False, variant: str = "S", patch: int = 16, count: int | None = None
) -> dict[str, Any]:
    """Print the table and return the speed of ours without merging: in float32 on a CPU, in bfloat16 on CUDA.

    Args:
        source: the images.
        csv: write the table.
        variant: width, depth and heads of all networks.
        patch: P.
        count: of images; None: those of `IMAGES`.

    Returns:
        `images_per_second`, `over_best_peer` (None where no peer is installed) and `bfloat16_gain`, how many times as
        fast bfloat16 is (1 on CUDA).
    """
    device = best_device()
    # On CUDA ragged streams have no kernel in float32 (ops/attention.py).
    precisions = [autocast_dtype("auto", device)] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    config = EncoderConfig(variant, patch)
    images = read(source, count or IMAGES[device.type], patch)
    lengths = [image.shape[0] * image.shape[1] // patch**2 for image in images]
    methods: dict[tuple[str, float], Embed] = {}
    with torch.inference_mode():
        encoder = Encoder(VisionTransformer(config), Preprocessing()).eval().to(device)
        for rate in RATES:
            methods["ours", rate] = ours(encoder, images, rate)
        absent: dict[str, str] = {}
        for name, peer in PEERS.items():
            try:
                methods[name, 0.0] = peer(config, images, device)
            except ModuleNotFoundError as error:
                absent[name] = "not installed" if error.name in name.split() else f"needs {error.name}"
        calls = [partial(under, dtype, device, embed) for dtype in precisions for embed in methods.values()]
        limits = [matrix_products(device, dtype) for dtype in precisions]
        seconds = seconds_by_turns([*calls, *(products for products, _ in limits)], device, TURNS)
    rows: list[dict[str, Any]] = []
    for number, (dtype, (_, operations)) in enumerate(zip(precisions, limits, strict=True)):
        taken = dict(zip(methods, seconds[number * len(methods) :], strict=False))
        peak = operations / seconds[len(calls) + number]
        best = min((time for (name, _), time in taken.items() if name != "ours"), default=None)
        precision = str(dtype).removeprefix("torch.")
        rows += [
            {
                "method": name,
                "precision": precision,
                "merge_rate": rate,
                "images_per_second": len(images) / time,
                "mfu": float(encoder_flops(config, lengths, rate).sum()) / time / peak,
                "over_best_peer": best / time if best else "",
            }
            for (name, rate), time in taken.items()
        ]
        rows += [
            dict.fromkeys(rows[0], "") | {"method": name, "precision": precision, "images_per_second": why}
            for name, why in absent.items()
        ]
    print(f"ViT-{variant}/{patch}, {len(images)} images of {source}, {np.mean(lengths):.0f} patches on average")
    print_table(rows)
    if csv:
        print(write_csv(f"embed-{variant}{patch}", rows))
    plain = [row for row in rows if (row["method"], row["merge_rate"]) == ("ours", 0.0)]
    return {
        "images_per_second": plain[0]["images_per_second"],
        "over_best_peer": plain[0]["over_best_peer"] or None,
        "bfloat16_gain": plain[-1]["images_per_second"] / plain[0]["images_per_second"],
    }


def read(source: str, count: int, patch: int) -> Images:
    """Return `count` images spread over a source, at `SCALE`, of at most `MOST_TOKENS`."""
    opened = open_source(source)
    rows = open_catalog(opened, cache=False).rows  # as in `step`
    images = []
    for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)].tolist():
        image = opened.open(row)
        size = np.array([upright_size(image)])
        grid = fit_grids(SCALE * size[:, 0], SCALE * size[:, 1], None, patch, MOST_TOKENS)
        images += decode_views(image, np.concatenate([np.zeros((1, 2), np.int64), size], axis=1), grid * patch)
    return images


def under(dtype: torch.dtype, device: torch.device, embed: Embed) -> None:
    """Embed with matrix products in `dtype`."""
    with autocast(device, dtype):
        embed()


def ours(encoder: Encoder, images: Images, rate: float) -> Embed:
    """Return what `Encoder.embed` does once it has read the images."""
    device = encoder.device
    packs = []
    for packed in encoder.packs(images, "native"):
        plan = encoder.merge_plan(packed.segments, rate)
        packs.append((packed.to(device), plan and plan.to(device)))
    return lambda: torch.cat(
        [segment_mean(encoder(packed, plan), packed.segments.cu_seqlens) for packed, plan in packs]
    )


def timm_naflexvit(config: EncoderConfig, images: Images, device: torch.device) -> Embed:
    """Use timm's own collator, which pads all images to the longest."""
    naflexvit, dataset = (import_module(f"timm.{name}") for name in ("models.naflexvit", "data.naflex_dataset"))
    shape, side = config.shape, config.patch_size
    cfg = naflexvit.NaFlexVitCfg(
        patch_size=side,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.mlp_ratio,
        pos_embed="factorized",
        pos_embed_grid_size=(config.max_grid, config.max_grid),
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


def vit_pytorch_navit(config: EncoderConfig, images: Images, device: torch.device) -> Embed:
    """Use its own grouping into rows of at most 2,048 tokens (its default)."""
    na_vit = import_module("vit_pytorch.na_vit")
    shape, side = config.shape, config.patch_size
    network = na_vit.NaViT(
        image_size=max(max(image.shape[:2]) for image in images),
        patch_size=side,
        num_classes=shape.width,
        dim=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        dim_head=shape.width // shape.heads,
        mlp_dim=round(shape.width * shape.mlp_ratio),
    )
    network.mlp_head = nn.Identity()
    network.eval().to(device)
    tensors = [normalized(image, device) for image in images]
    return lambda: network(tensors, group_images=True)


def transformers_ijepa(config: EncoderConfig, images: Images, device: torch.device) -> Embed:
    """Embed one image after another, with interpolated positions: a batch has one size."""
    transformers = import_module("transformers")
    shape, side = config.shape, config.patch_size
    network = transformers.IJepaModel(
        transformers.IJepaConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=round(shape.width * shape.mlp_ratio),
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--variant", default="S", help="Ti, S, B, L, H or g")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch in pixels")
    parser.add_argument("--images", type=int, dest="count", help="how many")
    run(**vars(parser.parse_args()))
