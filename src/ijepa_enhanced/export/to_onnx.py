"""An encoder as an ONNX file, checked in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.export.program import INPUT, OUTPUTS, Shape, check, quiet, trace
from ijepa_enhanced.files import replacing
from ijepa_enhanced.ops.preprocess import CHANNELS

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**24
"""Most bytes of weights: an ONNX file holds less than 2 GiB (protobuf's limit), of which 16 MiB are for the graph."""


def require_packages() -> None:
    """Raise RequestError if a package of the extra is missing."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise RequestError(
                f"Exporting to ONNX requires {package}. Install it with: pip install 'ijepa-enhanced[export]'"
            )


def export(encoder: Encoder, path: Path, shape: Shape) -> float:
    """Write a file, check it in ONNX Runtime, and return its largest relative difference from the encoder.

    Raises:
        RequestError: a package is missing, or the weights are too large for one file.
        RunError: ONNX Runtime computes other features.
        OSError: the file cannot be written.
    """
    require_packages()
    size = sum(value.numel() * value.element_size() for value in encoder.parameters())
    if size > LARGEST:
        raise RequestError(
            f"The weights have {size / 2**30:.1f} GiB, and an ONNX file cannot have 2. Use `ijepa export torch`."
        )
    model = translate(encoder, shape)
    model.model.metadata_props.update(facts(encoder))
    with replacing(path, new=True) as temporary:
        model.save(temporary)
        return check(encoder, shape, session(temporary), "ONNX Runtime")


def translate(encoder: Encoder, shape: Shape) -> torch.onnx.ONNXProgram:
    """Return an encoder as a graph of ONNX."""
    import onnx_ir

    # ONNX has no sort. Its TopK is stable: of equal values, the first comes first.
    program = trace(encoder, shape, {torch.ops.aten.argsort.stable: argsort})
    with quiet(), torch.no_grad():
        model = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert model is not None  # None only without `dynamo`
    if shape.grid is None:  # names that users understand
        model.model.graph.inputs[0].shape = onnx_ir.Shape([shape.batch, CHANNELS, "height", "width"])
        model.model.graph.outputs[1].shape = onnx_ir.Shape([shape.batch, "rows", "columns", encoder.width])
    return model


def argsort(x: Tensor, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """Compute `torch.argsort` by `torch.topk`."""
    return torch.topk(x, x.shape[dim], dim, descending).indices


def facts(encoder: Encoder) -> dict[str, str]:
    """Return what the user of a file must know, as its metadata."""
    known = {
        "patch_size": encoder.config.patch_size,
        "resolution": encoder.preprocessing.resolution,
        "pooling": encoder.preprocessing.pooling,
        "origin": encoder.origin and encoder.origin.name,
        "license": encoder.origin and encoder.origin.license,
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def session(model: Path | bytes, threads: int = 0) -> Callable[[NDArray[np.uint8]], tuple[Tensor, Tensor]]:
    """Return a function that runs a model on the CPU.

    Args:
        model: an ONNX file, or its contents.
        threads: 0: one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content: Any = model if isinstance(model, bytes) else str(model)
    runtime = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        feature, maps = runtime.run(list(OUTPUTS), {INPUT: images})
        return torch.from_numpy(feature), torch.from_numpy(maps)

    return run
