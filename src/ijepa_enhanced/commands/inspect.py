"""`ijepa inspect`: one picture each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.commands.options import DataOptions, FeatureOptions, MergeOptions, PackOptions
from ijepa_enhanced.commands.setup import check_files, configuration, print_counts, print_json, recipe_of_machine
from ijepa_enhanced.commands.train import first_batch
from ijepa_enhanced.data.catalog import LISTED, open_catalog, report_unreadable, summary
from ijepa_enhanced.data.loader import masks_of
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError, RunError, UserError
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.saved import read_train_config
from ijepa_enhanced.visualize.data import class_sizes, draw_survey, survey
from ijepa_enhanced.visualize.features import draw_features
from ijepa_enhanced.visualize.merges import draw_merges
from ijepa_enhanced.visualize.views import draw_masked_views, draw_pack, save_png

logger = logging.getLogger(__name__)


def data(options: DataOptions) -> int:
    """Draw some images of a source and their sizes; count color modes, labels and duplicates."""
    source = open_source(options.source)
    catalog = open_catalog(source)
    report_unreadable(catalog)
    if not len(catalog.rows):
        raise RunError(
            f"None of the {len(catalog.unreadable)} images of {options.source} can be read. The lines above say why."
        )
    seen = survey(source, catalog)
    report_undecodable(source, seen.unreadable)
    if not seen.rows:
        raise RunError(
            f"None of the {len(seen.unreadable)} images of {options.source} can be decoded. The lines above say why."
        )
    pictures = draw_survey(source, catalog, seen, Path(options.out))
    sizes = class_sizes(catalog)
    counts = summary(catalog) | {
        "modes": seen.modes,
        "looked_at": len(seen.rows),
        "identical": len(seen.identical),
        "near": len(seen.near),
    }
    print_counts(counts | {f"class {name}": size for name, size in list(sizes.items())[:LISTED]})
    if len(sizes) > LISTED:
        print(f"and {len(sizes) - LISTED} more classes with at least {min(sizes.values())} images each")
    pairs = [[source.key(row) for row in pair] for pair in seen.identical + seen.near]
    for number, (copy, earlier) in enumerate(pairs[:LISTED]):
        print(f"{'identical' if number < len(seen.identical) else 'near-duplicate'}: {copy} of {earlier}")
    if len(pairs) > LISTED:
        print(f"and {len(pairs) - LISTED} more duplicates")
    print(*pictures, sep="\n")
    more = {"classes": sizes, "duplicates": pairs, "pictures": [str(path) for path in pictures]}
    print_json(options, counts | more)
    return 0


def masks(options: PackOptions) -> int:
    """Draw the masks of the first views that a run trains on."""
    config, batch = opened_pack(options)
    picture = Path(options.out) / "masks.png"
    draw_masked_views(batch, masks_of(batch, config.masks, config.seed), config.encoder.patch_size, picture)
    return finish(options, picture)


def packing(options: PackOptions) -> int:
    """Draw the first pack that a run trains on."""
    config, batch = opened_pack(options)
    picture = Path(options.out) / "packing.png"
    draw_pack(batch, config.encoder.patch_size, picture)
    return finish(options, picture)


def opened_pack(options: PackOptions) -> tuple[TrainConfig, Batch]:
    """Return the configuration and the first pack of a run, or of a run that would train on a source.

    Raises:
        RequestError: there is no such source, or the configuration is wrong.
        RunError: no image of the pack can be decoded.
    """
    saved = Path(options.source) / "config.yaml"
    if saved.is_file():
        config = configuration(None, read_train_config(saved))
    else:
        config = configuration(options.config or recipe_of_machine(), {**options.given, "data.source": options.source})
    source = open_source(config.data.source)
    catalog = open_catalog(source)
    report_unreadable(catalog)
    batch = first_batch(config, source, catalog)
    report_undecodable(source, batch.unreadable)
    if not len(batch.image_ids):
        raise RunError(
            f"None of the {len(batch.unreadable)} images of the first training batch can be decoded. The lines above "
            "say why."
        )
    return config, batch


def report_undecodable(source: Source, unreadable: Sequence[tuple[int, str]]) -> None:
    """Log row and reason of images whose header can be read and the rest cannot."""
    for row, reason in unreadable:
        logger.warning("Skipped %s: %s", source.key(row), reason)


def finish(options: PackOptions | FeatureOptions, picture: Path) -> int:
    """Print the file of a picture, and return the exit code."""
    print(picture)
    print_json(options, {"picture": str(picture)})
    return 0


def merges(options: MergeOptions) -> int:
    """Draw which patches of images merge."""
    check_files(options.images)
    encoder = Encoder.from_pretrained(options.run).to(best_device())
    drawn = {}
    for number, path in enumerate(map(Path, options.images)):
        # Two folders may hold images of one name.
        name = f"merges-{number:02d}-{path.stem}.png"
        drawn[name] = draw_merges(encoder, path, options.resolution, options.merge_rate)
    folder = Path(options.out)
    for name, picture in drawn.items():
        save_png(picture, folder / name)
        print(folder / name)
    print_json(options, {"pictures": [str(folder / name) for name in drawn]})
    return 0


def features(options: FeatureOptions) -> int:
    """Draw the features of images."""
    check_files(options.images)
    encoder = Encoder.from_pretrained(options.run).to(best_device())
    picture = Path(options.out) / "features.png"
    try:
        grids = draw_features(encoder, options.images, picture, options.patch, options.resolution)
    except UserError:
        raise
    except ValueError as error:  # there is no such patch
        raise RequestError(str(error)) from error
    for path, (rows, cols) in zip(options.images, grids, strict=True):
        logger.info("%s: %d rows, %d columns of patches", path, rows, cols)
    return finish(options, picture)
