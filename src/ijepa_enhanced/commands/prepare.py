"""`ijepa prepare`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ijepa_enhanced.commands.options import PrepareOptions
from ijepa_enhanced.commands.setup import counting_bars, print_counts, print_json
from ijepa_enhanced.data.catalog import LISTED, open_catalog
from ijepa_enhanced.data.prepare import MANIFEST, check, prepare
from ijepa_enhanced.data.remote import fetch
from ijepa_enhanced.data.sources.open import is_remote, open_source
from ijepa_enhanced.devices import default_workers
from ijepa_enhanced.errors import RunError

logger = logging.getLogger(__name__)


def run(options: PrepareOptions) -> int:
    """Prepare a source, or check what was prepared."""
    return _check(options) if options.check else _prepare(options)


def _prepare(options: PrepareOptions) -> int:
    assert options.out is not None  # the options are checked
    workers = default_workers() if options.workers is None else options.workers
    spec, folder = options.source, Path(options.out)
    copies = folder / ".remote"
    with counting_bars() as bar:
        if is_remote(spec):
            copied = bar.add_task("files", total=None)
            spec = fetch(spec, copies, lambda done, total: bar.update(copied, completed=done, total=total))
        source = open_source(spec)
        source.name = options.source
        encoded = bar.add_task("images", total=None)
        manifest = prepare(
            source,
            folder,
            options.max_resolution,
            options.quality,
            workers,
            options.shard_size,
            lambda done, total: bar.update(encoded, completed=done, total=total),
        )
    if copies.exists():
        shutil.rmtree(copies)
    for image in manifest["dropped"][:LISTED]:
        logger.warning("Skipped %s: %s", image["key"], image["reason"])
    if len(manifest["dropped"]) > LISTED:
        logger.warning("Skipped %d more images; see %s.", len(manifest["dropped"]) - LISTED, folder / MANIFEST)
    if not manifest["shards"]:
        raise RunError(
            f"None of the {len(manifest['dropped'])} images of {options.source} can be decoded. The lines above say "
            "why."
        )
    open_catalog(open_source(str(folder)))
    counts = {
        "images": sum(shard["images"] for shard in manifest["shards"]),
        "dropped": len(manifest["dropped"]),
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
    }
    print_counts(counts)
    print_json(options, counts)
    return 0


def _check(options: PrepareOptions) -> int:
    problems = check(Path(options.source))
    if problems:
        raise RunError("\n  ".join([f"{options.source} has problems:", *problems]))
    print(f"{options.source}: all checksums match")
    print_json(options, {"problems": 0})
    return 0
