"""How many images of mixed sizes a second are embedded, and how good the features are.

    python -m ijepa_enhanced.benchmarks.embed --source SOURCE
    python -m ijepa_enhanced.benchmarks.embed --source VAL --train TRAIN --weights RUN
    python -m ijepa_enhanced.benchmarks.embed --source SOURCE --weights DINOV2 --scale 1

It compares ours, at several merge rates, with what people use today, with the same weights and the same images: timm's
NaFlexViT on padded batches and transformers' IJepaModel on one image after another, both with our positions, which
compute our features, up to rounding; and IJepaModel on batches of images that are squashed to squares, of 224 px and of
as many patches as the images have on average. What is not installed is left out. If `--weights` is a folder that
transformers wrote, the peer is the model that transformers loads from it.

Speed is that of the network alone: pixels are resized, batched and on the device beforehand, and normalized where the
network does not do that itself. With `--train` each method also embeds up to 1,000 labeled images of each source, and
those of VAL are classified by their nearest neighbors in TRAIN. Compare these scores with each other only: they say how
good the features of each method are, not how good the encoder is. Without `--weights`, weights are random.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.benchmarks.ceilings import matrix_products
from ijepa_enhanced.benchmarks.methods import OURS, Method, methods_of, patches_of
from ijepa_enhanced.benchmarks.peers import Embed, Images
from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import decode_views
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.opening import upright_size
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype, best_device, kind_of
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate.cost import interleaved_seconds
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.labelled import labelled_pair
from ijepa_enhanced.evaluate.scores import interval, mcnemar
from ijepa_enhanced.evaluate.tokens import LabelledSource
from ijepa_enhanced.models.config import Architecture, EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.variants import variant_name

TURNS = 3
IMAGES = {"cpu": 16, "gpu": 256}
SCALE, MOST_TOKENS = 2.0, 1024
"""Images are shown at twice their size, so that those of small data sets are as large and as mixed as photographs, and
smaller if they had more tokens."""
LABELED = 1000
"""Most images of each source for the nearest neighbors: scores then have a standard error of at most 1.6 points."""
CHUNK = 64
"""Images in memory at once while features are computed."""


def run(
    source: str = "synthetic",
    csv: bool = False,
    variant: str = "S",
    patch: int = 16,
    count: int | None = None,
    weights: str | None = None,
    train: str | None = None,
    scale: float = SCALE,
) -> dict[str, Any]:
    """Print the table and return the speed of ours without merging: in float32 on a CPU, in bfloat16 on CUDA.

    Args:
        source: the images; with `train`, labeled ones to classify.
        csv: write the table.
        variant: width, depth and heads of all networks, if `weights` is None.
        patch: P, if `weights` is None.
        count: of images whose speed is measured; None: those of `IMAGES`.
        weights: folder of an encoder; None: random weights.
        train: labeled images whose classes are known; None: classify none.
        scale: that images are shown at, a multiple of their own size.

    Returns:
        `images_per_second`, `over_best_peer` (None where no peer is installed) and `bfloat16_gain`, how many times as
        fast bfloat16 is (1 on CUDA, and on a CPU that does not multiply it).

    Raises:
        RequestError: see `load` and `labelled_pair`.
    """
    device = best_device()
    encoder = load(weights, variant, patch).to(device)
    name = f"{variant_name(encoder.width)}/{encoder.config.patch_size}"
    config, pair = encoder.config, [some(images) for images in labelled_pair(train, source)] if train else None
    images = read(source, count or IMAGES[kind_of(device)], config.patch_size, scale)
    patches = float(np.mean(patches_of(images, config)))
    # On CUDA ragged streams have no kernel in float32 (ops/attention.py).
    fast = autocast_dtype("auto", device)
    precisions = [fast] if device.type != "cpu" else list(dict.fromkeys([torch.float32, fast]))
    with torch.inference_mode():
        methods, absent = methods_of(encoder, patches, weights if is_of_transformers(encoder) else None)
        rows = speed_rows(methods, absent, images, config, device, precisions)
        if pair is not None:
            reading = partial(enlarged, patch=config.patch_size, scale=scale)
            scores = knn_scores(methods, pair, reading, partial(under, precisions[0], device))
            none = dict.fromkeys(scores[0], "")
            rows = [row | (scores[number] if number < len(methods) else none) for number, row in enumerate(rows)]
    print(f"Embedding {len(images)} images of {source} with ViT-{name}, ", end="")
    print(f"{patches:.0f} patches each")
    print_table(rows)
    if csv:
        print(write_csv(f"embed-{name.replace('/', '')}", rows))
    plain = [row for row in rows if (row["method"], row["merge_rate"]) == (OURS, 0.0)]
    return {
        "images_per_second": plain[0]["images_per_second"],
        "over_best_peer": plain[0]["over_best_peer"] or None,
        "bfloat16_gain": plain[-1]["images_per_second"] / plain[0]["images_per_second"],
    }


def load(weights: str | None, variant: str, patch: int) -> Encoder:
    """Return a saved encoder, or a random one.

    Raises:
        RequestError: the folder has no encoder, or its patch embedding does not exist in other networks.
    """
    if weights is None:
        return Encoder.random(EncoderConfig(variant, patch).architecture, Preprocessing(), seed=0)
    encoder = Encoder.from_pretrained(weights)
    if not is_of_transformers(encoder) and encoder.config.patch_embed != "linear":
        raise RequestError(
            f"The encoder in {weights} has encoder.patch_embed '{encoder.config.patch_embed}', which timm and "
            "transformers do not have. Train one with --encoder.patch_embed linear."
        )
    return encoder


def is_of_transformers(encoder: Encoder) -> bool:
    """Return whether the encoder was loaded from a folder that transformers wrote."""
    return encoder.origin is not None and encoder.origin.layout.startswith("transformers")


def speed_rows(
    methods: Sequence[Method],
    absent: dict[str, str],
    images: Images,
    config: Architecture,
    device: torch.device,
    precisions: Sequence[torch.dtype],
) -> list[dict[str, Any]]:
    """Return the speed of each method in each precision.

    Args:
        methods: M methods.
        absent: the peers that cannot run, and why.
        images: N images.
        config: the encoder.
        device: where it is.
        precisions: of matrix products.

    Returns:
        For each precision, a row for each method and one for each absent peer.
    """
    prepared = [method.prepare(method.shown(images)) for method in methods]
    calls = [partial(under, dtype, device, embed) for dtype in precisions for embed in prepared]
    products, operations = zip(*(matrix_products(device, dtype) for dtype in precisions), strict=True)
    seconds = interleaved_seconds([*calls, *products], device, TURNS)
    flops = [
        float(encoder_flops(config, patches_of(method.shown(images), config), method.merge_rate).sum())
        for method in methods
    ]
    # Squares are other images, of fewer patches.
    peers = [number for number, method in enumerate(methods) if method.name != OURS and method.square is None]
    rows: list[dict[str, Any]] = []
    for number, dtype in enumerate(precisions):
        taken = seconds[number * len(methods) : (number + 1) * len(methods)]
        peak = operations[number] / seconds[len(calls) + number]
        best = min((taken[peer] for peer in peers), default=None)
        precision = str(dtype).removeprefix("torch.")
        for method, time, count in zip(methods, taken, flops, strict=True):
            rows.append(
                {
                    "method": method.name,
                    "precision": precision,
                    "merge_rate": method.merge_rate,
                    "images_per_second": len(images) / time,
                    "mfu": count / time / peak,
                    "over_best_peer": best / time if best else "",
                }
            )
        empty = dict.fromkeys(rows[0], "") | {"precision": precision}
        rows += [empty | {"method": name, "images_per_second": why} for name, why in absent.items()]
    return rows


def knn_scores(
    methods: Sequence[Method],
    pair: Sequence[LabelledSource],
    reading: Callable[[Source, NDArray[np.integer]], Images],
    within: Callable[[Embed], Tensor],
) -> list[dict[str, float]]:
    """Return how many images each method classifies right by its 20 nearest neighbors, the first method being ours.

    Args:
        methods: M methods.
        pair: labeled images to learn from, and labeled images to classify.
        reading: reads rows of a source.
        within: calls what embeds images.

    Returns:
        For each method `knn20`, a fraction of 1; `knn20_low` and `knn20_high`, its 95% interval; and `knn20_p`, the
        chance to see a difference from the first method as large as this if there were none (McNemar).
    """
    train, val = (features_of(methods, images, reading, within) for images in pair)
    train_labels, labels = (torch.tensor(images.catalog.labels) for images in pair)
    right = [knn_classify(*both, k=20) == labels for both in zip(train, [train_labels] * len(train), val, strict=True)]
    scores = []
    for each in right:
        low, high = interval(int(each.sum()), len(labels))
        found = {"knn20": float(each.double().mean()), "knn20_low": low, "knn20_high": high}
        scores.append(found | {"knn20_p": mcnemar(each, right[0])})
    return scores


def features_of(
    methods: Sequence[Method],
    images: LabelledSource,
    reading: Callable[[Source, NDArray[np.integer]], Images],
    within: Callable[[Embed], Tensor],
) -> list[Tensor]:
    """Return the features of all images by each method: M tensors [N, D]; arguments as for `knn_scores`."""
    found: list[list[Tensor]] = [[] for _ in methods]
    for start in range(0, len(images.catalog.rows), CHUNK):
        chunk = reading(images.source, images.catalog.rows[start : start + CHUNK])
        for method, features in zip(methods, found, strict=True):
            features.append(within(method.prepare(method.shown(chunk))).float().cpu())
    return [torch.cat(features) for features in found]


def read(source: str, count: int, patch: int, scale: float = SCALE) -> Images:
    """Return `count` images spread over a source; see `enlarged`."""
    opened = open_source(source)
    rows = open_catalog(opened, cache=False).rows  # as in `step`
    return enlarged(opened, rows[spread(len(rows), count)], patch, scale)


def some(images: LabelledSource) -> LabelledSource:
    """Return `LABELED` of the images, spread over the source, or all if there are fewer."""
    return LabelledSource(images.source, images.catalog.select(spread(len(images.catalog.rows), LABELED)))


def spread(total: int, count: int) -> NDArray[np.int64]:
    """Return `count` numbers below `total`, evenly spread, or all of them if there are fewer: int64."""
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)


def enlarged(source: Source, rows: NDArray[np.integer], patch: int, scale: float) -> Images:
    """Return images of a source at a multiple of their size, of at most `MOST_TOKENS`."""
    images = []
    for row in rows.tolist():
        image = source.open(row)
        size = np.array([upright_size(image)])
        grid = fit_grids(scale * size[:, 0], scale * size[:, 1], None, patch, MOST_TOKENS)
        images += decode_views(image, np.concatenate([np.zeros((1, 2), np.int64), size], axis=1), grid * patch)
    return images


def under(dtype: torch.dtype, device: torch.device, embed: Embed) -> Tensor:
    """Embed with matrix products in `dtype`."""
    with autocast(device, dtype):
        return embed()


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return the parser of an embedding benchmark. Its help begins with `text`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--variant", default="S", help="Ti, S, B, L, H or g, for random weights")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch in pixels, for random weights")
    parser.add_argument("--images", type=int, dest="count", help="how many to measure the speed with")
    parser.add_argument("--weights", help="folder of a trained encoder")
    parser.add_argument("--train", help="labeled images; then those of --source are classified")
    return parser


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--scale", type=float, default=SCALE, help="multiple of their size that images are shown at")
    run(**vars(parser.parse_args()))
