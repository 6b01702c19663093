"""How fast ONNX Runtime embeds images of mixed sizes on a CPU, in float32 and int8, and how good the features are.

    python -m ijepa_enhanced.benchmarks.export --source SOURCE
    python -m ijepa_enhanced.benchmarks.export --source VAL --train TRAIN --weights RUN

It compares ours, packed and one image after another, with the file of `ijepa export onnx`, which takes one image after
another, and with that file quantized dynamically by ONNX Runtime: int8 weights, and activations rounded to 8 bits
before each product. All use as many threads as PyTorch, and compute in turns.

`cosine` is the mean cosine of the features with ours. `--train` also compares nearest neighbors, as in
`ijepa_enhanced.benchmarks.embed`, where images and scores are explained.
"""

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ijepa_enhanced.benchmarks.embed import IMAGES, SCALE, TURNS, enlarged, knn_scores, parser_of, read, some
from ijepa_enhanced.benchmarks.methods import OURS, Method, ours, patches_of
from ijepa_enhanced.benchmarks.peers import Embed, Images, Prepare
from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.cost import interleaved_seconds
from ijepa_enhanced.evaluate.labelled import labelled_pair
from ijepa_enhanced.export import to_onnx
from ijepa_enhanced.export.program import Shape
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.variants import variant_name


def run(
    source: str = "synthetic",
    csv: bool = False,
    variant: str = "S",
    patch: int = 16,
    count: int | None = None,
    weights: str | None = None,
    train: str | None = None,
) -> list[dict[str, Any]]:
    """Print the table and return its rows; arguments and errors are those of `benchmarks.embed.run`."""
    if weights is None:
        encoder = Encoder.random(EncoderConfig(variant, patch).architecture, Preprocessing(), seed=0)
    else:
        encoder = Encoder.from_pretrained(weights)
    side = encoder.config.patch_size
    pair = [some(images) for images in labelled_pair(train, source)] if train else None
    images = read(source, count or IMAGES["cpu"], side)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        methods = [
            Method(OURS, 0.0, partial(ours, encoder, 0.0)),
            Method(f"{OURS}, one at a time", 0.0, partial(one_at_a_time, encoder)),
            *onnx_methods(encoder, Path(folder)),
        ]
        calls = [method.prepare(images) for method in methods]
        features = [call() for call in calls]
        seconds = interleaved_seconds(calls, encoder.device, TURNS)
        reading = partial(enlarged, patch=side, scale=SCALE)
        scores = knn_scores(methods, pair, reading, lambda embed: embed()) if pair else [{}] * len(methods)
    rows = [
        {
            "method": method.name,
            "images_per_second": len(images) / time,
            "over_ours": seconds[0] / time,
            "cosine": float(F.cosine_similarity(found, features[0]).mean()),
        }
        | score
        for method, time, found, score in zip(methods, seconds, features, scores, strict=True)
    ]
    name = f"{variant_name(encoder.width)}/{side}"
    mean = sum(patches_of(images, encoder.config)) / len(images)
    print(f"Embedding {len(images)} images of {source} with ViT-{name}, {mean:.0f} patches each, ", end="")
    print(f"{torch.get_num_threads()} threads")
    print_table(rows)
    if csv:
        print(write_csv(f"export-{name.replace('/', '')}", rows))
    return rows


def one_at_a_time(encoder: Encoder, images: Images) -> Embed:
    """Return what embeds one image after another, as ONNX Runtime does."""
    alone = [ours(encoder, 0.0, [image]) for image in images]
    return lambda: torch.cat([embed() for embed in alone])


def onnx_methods(encoder: Encoder, folder: Path) -> list[Method]:
    """Return ONNX Runtime in float32 and in int8, with files in `folder`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported, quantized = folder / "float32.onnx", folder / "int8.onnx"
    with torch.inference_mode(False):
        to_onnx.export(encoder, exported, Shape())
    logging.disable(logging.WARNING)  # it advises steps that change nothing here
    quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    return [Method(f"onnxruntime {path.stem}", 0.0, prepare_onnx(path)) for path in (exported, quantized)]


def prepare_onnx(path: Path) -> Prepare:
    """Return what embeds images by an ONNX file."""
    run_file = to_onnx.session(path, torch.get_num_threads())

    def prepare(images: Images) -> Embed:
        batches = [image.transpose(2, 0, 1)[None].copy() for image in images]
        return lambda: torch.cat([run_file(batch)[0] for batch in batches])

    return prepare


if __name__ == "__main__":
    run(**vars(parser_of(__doc__).parse_args()))
