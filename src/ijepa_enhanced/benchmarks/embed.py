"""How many images of mixed sizes a second are embedded: `python -m ijepa_enhanced.benchmarks.embed --source SOURCE`.

It compares ours, at several merge rates, with other networks of the same size that are installed: timm's NaFlexViT on
padded batches, vit-pytorch's NaViT on rows of its own grouping, transformers' IJepaModel on one image after another.
Weights are random. All read the same pixels, which are resized, batched and on the device beforehand, and normalized
where the network does not do that itself. So the time is that of the network alone, in one precision of autocast.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ijepa_enhanced.benchmarks.ceilings import matrix_products
from ijepa_enhanced.benchmarks.peers import PEERS, Embed, Images
from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import decode_views, upright_size
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype, best_device
from ijepa_enhanced.encoder import Encoder, Preprocessing
from ijepa_enhanced.evaluate.cost import interleaved_seconds
from ijepa_enhanced.models.config import Architecture, EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.pooling import segment_mean

TURNS = 3
IMAGES = {"cpu": 16, "cuda": 256}
SCALE, MOST_TOKENS = 2, 1024
"""Images are shown at twice their size, so that those of small data sets are as large and as mixed as photographs."""
RATES = (0.0, 0.05, 0.12)


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
    config = EncoderConfig(variant, patch).architecture
    images = read(source, count or IMAGES[device.type], patch)
    lengths = [image.shape[0] * image.shape[1] // patch**2 for image in images]
    with torch.inference_mode():
        methods, absent = methods_of(config, images, device)
        calls = [partial(under, dtype, device, embed) for dtype in precisions for embed in methods.values()]
        products, operations = zip(*(matrix_products(device, dtype) for dtype in precisions), strict=True)
        seconds = interleaved_seconds([*calls, *products], device, TURNS)
    rows: list[dict[str, Any]] = []
    for number, dtype in enumerate(precisions):
        taken = dict(zip(methods, seconds[number * len(methods) :], strict=False))
        peak = operations[number] / seconds[len(calls) + number]
        rows += speed_rows(str(dtype).removeprefix("torch."), config, lengths, taken, absent, peak)
    print(f"Embedding {len(images)} images of {source} with ViT-{variant}/{patch}, {np.mean(lengths):.0f} patches each")
    print_table(rows)
    if csv:
        print(write_csv(f"embed-{variant}{patch}", rows))
    plain = [row for row in rows if (row["method"], row["merge_rate"]) == ("ours", 0.0)]
    return {
        "images_per_second": plain[0]["images_per_second"],
        "over_best_peer": plain[0]["over_best_peer"] or None,
        "bfloat16_gain": plain[-1]["images_per_second"] / plain[0]["images_per_second"],
    }


def methods_of(
    config: Architecture, images: Images, device: torch.device
) -> tuple[dict[tuple[str, float], Embed], dict[str, str]]:
    """Return the methods that can be compared here, by name and merge rate, and why each other peer is absent."""
    encoder = Encoder(VisionTransformer(config), Preprocessing()).eval().to(device)
    methods: dict[tuple[str, float], Embed] = {("ours", rate): ours(encoder, images, rate) for rate in RATES}
    absent: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            methods[name, 0.0] = peer(config, images, device)
        except ModuleNotFoundError as error:
            absent[name] = "not installed" if error.name in name.split() else f"needs {error.name}"
    return methods, absent


def speed_rows(
    precision: str,
    config: Architecture,
    lengths: Sequence[int],
    taken: dict[tuple[str, float], float],
    absent: dict[str, str],
    peak: float,
) -> list[dict[str, Any]]:
    """Return a row for each method in one precision.

    Args:
        precision: its name.
        config: the encoder.
        lengths: patches of each of N images.
        taken: seconds for all images, by method and merge rate.
        absent: the peers that cannot run, and why.
        peak: operations a second that the device reaches in this precision.
    """
    best = min((time for (name, _), time in taken.items() if name != "ours"), default=None)
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "precision": precision,
            "merge_rate": rate,
            "images_per_second": len(lengths) / time,
            "mfu": float(encoder_flops(config, lengths, rate).sum()) / time / peak,
            "over_best_peer": best / time if best else "",
        }
        for (name, rate), time in taken.items()
    ]
    empty = dict.fromkeys(rows[0], "") | {"precision": precision}
    return [*rows, *(empty | {"method": name, "images_per_second": why} for name, why in absent.items())]


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--variant", default="S", help="Ti, S, B, L, H or g")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch in pixels")
    parser.add_argument("--images", type=int, dest="count", help="how many")
    run(**vars(parser.parse_args()))
