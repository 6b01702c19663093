"""`ijepa inspect`: one picture each."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import (
    add_configuration,
    add_encoder,
    check_setting,
    load_encoder,
    print_counts,
    print_json,
    train_config,
)
from ijepa_enhanced.commands.train import first_batch
from ijepa_enhanced.data.catalog import LISTED, open_catalog, report_unreadable, summary
from ijepa_enhanced.data.loader import masks_of
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.errors import RequestError, RunError, UnreadableImage
from ijepa_enhanced.train.saved import load_config
from ijepa_enhanced.visualize.data import class_sizes, draw_survey, survey
from ijepa_enhanced.visualize.features import draw_features
from ijepa_enhanced.visualize.merges import draw_merges
from ijepa_enhanced.visualize.views import draw_masked_views, draw_pack, save_png

logger = logging.getLogger(__name__)


def add_out(picture: ArgumentParser) -> None:
    """Where a picture goes."""
    picture.add_argument("--out", type=str, required=True, metavar="DIR", help="folder for what is drawn")


def add_pack_options(picture: ArgumentParser) -> None:
    """The options of what draws the first pack of a run."""
    picture.add_argument("source", type=str, help="a run, or images: a folder, tar shards, Parquet, a list, synthetic")
    add_configuration(picture)
    picture.add_argument("--run", help=argparse.SUPPRESS)  # a configuration file may have it
    add_out(picture)


def add_merges_options(picture: ArgumentParser) -> None:
    """The options of `ijepa inspect merges`."""
    add_image_options(picture)
    picture.add_argument(
        "--merge-rate", type=float, default=0.1, help="share of its tokens that each layer merges, up to 0.5"
    )


def add_features_options(picture: ArgumentParser) -> None:
    """The options of `ijepa inspect features`."""
    add_image_options(picture)
    picture.add_argument(
        "--patch", type=int, nargs=2, default=None, metavar=("ROW", "COLUMN"), help="show what is similar to this patch"
    )


def add_image_options(picture: ArgumentParser) -> None:
    """The options of what draws images as an encoder sees them."""
    add_encoder(picture)
    picture.add_argument("images", type=str, nargs="+", help="image files")
    add_out(picture)


def add_data_options(picture: ArgumentParser) -> None:
    """The options of `ijepa inspect data`."""
    picture.add_argument("source", type=str, help="a folder, tar shards, Parquet, a list, hf://NAME, or synthetic")
    add_out(picture)


def inspect_data(options: Namespace) -> int:
    """Draw some images of a source and how large they are; count modes, labels and duplicates."""
    source = open_source(options.source)
    catalog = open_catalog(source)
    report_unreadable(catalog)
    if not len(catalog.rows):
        raise RunError(f"None of the {len(catalog.unreadable)} images of {options.source} can be read.")
    seen = survey(source, catalog)
    for row, reason in seen.unreadable:
        logger.warning("Left out: %s: %s", source.key(row), reason)
    if not seen.rows:
        raise RunError(f"None of the {len(seen.unreadable)} images of {options.source} can be decoded.")
    folder = Path(options.out)
    pictures = draw_survey(source, catalog, seen, folder)
    sizes = class_sizes(catalog)
    counts = summary(catalog) | {
        "modes": seen.modes,
        "looked_at": len(seen.rows),
        "identical": len(seen.identical),
        "near": len(seen.near),
    }
    print_counts(counts)
    for name, size in list(sizes.items())[:LISTED]:
        print(f"       class  {name}: {size}")
    if len(sizes) > LISTED:
        print(f"       class  {len(sizes) - LISTED} more, of {min(sizes.values())} images at least")
    for path in pictures:
        print(path)
    print_json(options, counts | {"classes": sizes, "pictures": [str(path) for path in pictures]})
    return 0


def inspect_pack(name: str, options: Namespace) -> int:
    """Draw the first pack that a run would train on: its masks, or how it is filled."""
    config, source = train_config(options), options.source
    if (run := Path(source)).joinpath("config.yaml").is_file():
        config = load_config(run)
        source = config.data.source
    batch = first_batch(config, source)
    if not len(batch.image_ids):
        raise RunError(f"None of the {len(batch.unreadable)} images of the first pack can be decoded.")
    picture = Path(options.out) / f"{name}.png"
    if name == "masks":
        draw_masked_views(batch, masks_of(batch, config.masks, config.seed), config.encoder.patch_size, picture)
    else:
        draw_pack(batch, config.encoder.patch_size, picture)
    print(picture)
    print_json(options, {"picture": str(picture)})
    return 0


def inspect_merges(options: Namespace) -> int:
    """Draw what merges in images."""
    check_setting(options.resolution, options.merge_rate)
    if options.merge_rate == 0:
        raise RequestError("At a merge rate of 0 nothing merges: ask for one up to 0.5.")
    encoder = load_encoder(options.run).to(best_device())
    drawn = {}
    for number, path in enumerate(map(Path, options.images)):
        if not path.is_file():
            raise RequestError(f"No file {path}.")
        # Two folders may hold images of one name.
        drawn[f"merges-{number:02d}-{path.stem}.png"] = draw_merges(
            encoder, path, options.resolution, options.merge_rate
        )
    folder = Path(options.out)
    for name, picture in drawn.items():
        save_png(picture, folder / name)
        print(folder / name)
    print_json(options, {"pictures": [str(folder / name) for name in drawn]})
    return 0


def inspect_features(options: Namespace) -> int:
    """Draw images' features."""
    check_setting(options.resolution, 0.0)
    encoder = load_encoder(options.run).to(best_device())
    for path in map(Path, options.images):
        if not path.is_file():
            raise RequestError(f"No file {path}.")
    folder = Path(options.out)
    picture = folder / "features.png"
    try:
        grids = draw_features(
            encoder, options.images, picture, options.patch and tuple(options.patch), options.resolution
        )
    except UnreadableImage:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error
    for path, (rows, cols) in zip(options.images, grids, strict=True):
        logger.info("%s: %d rows, %d columns of patches", path, rows, cols)
    print(picture)
    print_json(options, {"picture": str(picture)})
    return 0


COMMANDS = {
    "data": Command(
        "Draw some images of a source and their sizes; count labels, modes and duplicates.",
        add_data_options,
        inspect_data,
    ),
    "masks": Command(
        "Draw what the student sees of the first views of a run, and what it must predict.",
        add_pack_options,
        partial(inspect_pack, "masks"),
    ),
    "packing": Command(
        "Draw the first pack of a run, patch by patch.", add_pack_options, partial(inspect_pack, "packing")
    ),
    "features": Command(
        "Draw the principal components of images' features as colours, and what is similar to a patch.",
        add_features_options,
        inspect_features,
    ),
    "merges": Command(
        "Draw which patches of images become one token, layer after layer.", add_merges_options, inspect_merges
    ),
}
