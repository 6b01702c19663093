"""`ijepa export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ijepa_enhanced.commands.options import ExportOptions, ProgramOptions, TransformersOptions
from ijepa_enhanced.commands.setup import print_counts, print_json
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.export import to_onnx as onnx
from ijepa_enhanced.export import to_torch as pt2
from ijepa_enhanced.export import to_transformers as folders
from ijepa_enhanced.export.program import INPUT, OUTPUTS, Shape, trained_grid
from ijepa_enhanced.files import make_folder
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.train.start import origin_of


def to_transformers(options: TransformersOptions) -> int:
    """Write a folder of transformers, and print what it is.

    Raises:
        UserError: the request is wrong, or transformers has no such model.
    """
    out = new_place(options)
    encoder = load(options.weights)
    grid = options.rows_and_columns() or trained_grid(encoder)
    if grid is None:
        raise RequestError(
            f"{options.weights} was trained at the native size of each image. Give the size for which positions are "
            "computed: --grid ROWSxCOLUMNS."
        )
    model = folders.export(encoder, out, grid)
    height, width = (edge * encoder.config.patch_size for edge in grid)
    print_counts({"model": model.name, "images": f"{height} x {width} px", "folder": out})
    print_json(options, {"out": str(out), "model": model.name, "grid": grid})
    return 0


def to_onnx(options: ProgramOptions) -> int:
    """Write an ONNX file, and print its interface and how close its results are.

    Raises:
        UserError: the request is wrong, a package is missing, or the file does not compute the same.
    """
    onnx.require_packages()
    return write_program(options, onnx.export)


def to_torch(options: ProgramOptions) -> int:
    """Write a file of `torch.export`; otherwise as `to_onnx`."""
    return write_program(options, pt2.export)


def write_program(options: ProgramOptions, export: Callable[[Encoder, Path, Shape], float]) -> int:
    """Write a file, and print its interface and how close its results are."""
    out = new_place(options)
    encoder = load(options.weights)
    shape = Shape(options.batch, options.rows_and_columns(), options.merge_rate)
    make_folder(out.parent)
    difference = export(encoder, out, shape)
    patch, width = encoder.config.patch_size, encoder.width
    rows, cols = shape.grid or ("rows", "columns")
    height, length = (f"{patch} * {edge}" if shape.grid is None else f"{patch * edge}" for edge in (rows, cols))
    print_counts(
        {
            INPUT: f"uint8 [{shape.batch}, 3, {height}, {length}], RGB, not normalized",
            OUTPUTS[0]: f"float32 [{shape.batch}, {width}]",
            OUTPUTS[1]: f"float32 [{shape.batch}, {rows}, {cols}, {width}]",
            "difference": f"{difference:.1e} at most, relative, from the encoder",
            "file": out,
        }
    )
    print_json(options, {"out": str(out), "difference": difference})
    return 0


def load(weights: str) -> Encoder:
    """Load an encoder. If its origin has no license, use the license that its card states.

    Raises:
        RequestError: its images are not RGB.
        EncoderError: it cannot be loaded.
    """
    encoder = Encoder.from_pretrained(weights)
    if encoder.config.channels != CHANNELS:
        raise RequestError(
            f"{weights} takes images of {encoder.config.channels} channels, but exported programs take RGB of 8 bits. "
            "Use it from Python, with Encoder.from_pretrained."
        )
    encoder.origin = encoder.origin or origin_of(encoder, weights)
    return encoder


def new_place(options: ExportOptions) -> Path:
    """Return where to write.

    Raises:
        RequestError: something is there.
    """
    if Path(options.out).exists():
        raise RequestError(f"{options.out} already exists. Give another OUT.")
    return Path(options.out)
