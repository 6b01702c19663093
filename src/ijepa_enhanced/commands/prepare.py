"""`ijepa prepare`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ijepa_enhanced.commands.options import PrepareOptions
from ijepa_enhanced.commands.setup import counting_bars, print_counts, print_json
from ijepa_enhanced.data.catalog import LISTED, open_catalog
from ijepa_enhanced.data.prepare import MANIFEST, Manifest, alone, begun, check, prepare, settings_of
from ijepa_enhanced.data.remote import fetch
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import is_remote, open_source
from ijepa_enhanced.devices import default_workers
from ijepa_enhanced.errors import RunError

logger = logging.getLogger(__name__)


def run(options: PrepareOptions) -> int:
    """Prepare a source, or check what was prepared."""
    return _check(options) if options.check else _prepare(options)


def _prepare(options: PrepareOptions) -> int:
    assert options.out is not None  # the options are checked
    folder = Path(options.out)
    local = None if is_remote(options.source) else open_source(options.source)
    before = begun(folder, settings_of(options.max_resolution, options.quality, options.shard_size))
    copies = folder / ".remote"
    with alone(folder):
        if local is None and before and before["complete"] and before["source"] == options.source:
            manifest = before  # without copying all of it to see that nothing is left to do
        else:
            manifest = _encode(options, local, folder, copies)
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


def _encode(options: PrepareOptions, local: Source | None, folder: Path, copies: Path) -> Manifest:
    """Prepare a source; if `local` is None it is remote, and its files are copied first."""
    with counting_bars() as bar:
        source = local
        if source is None:
            copied = bar.add_task("files", total=None)
            spec = fetch(options.source, copies, lambda done, total: bar.update(copied, completed=done, total=total))
            source = open_source(spec)
        source.name = options.source
        encoded = bar.add_task("images", total=None)
        return prepare(
            source,
            folder,
            options.max_resolution,
            options.quality,
            default_workers() if options.workers is None else options.workers,
            options.shard_size,
            lambda done, total: bar.update(encoded, completed=done, total=total),
        )


def _check(options: PrepareOptions) -> int:
    problems = check(Path(options.source))
    if problems:
        raise RunError("\n  ".join([f"{options.source} has problems:", *problems]))
    print(f"{options.source}: all checksums match")
    print_json(options, {"problems": 0})
    return 0
