"""`ijepa prepare`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import counting_bars, print_counts, print_json
from ijepa_enhanced.data.catalog import LISTED, open_catalog
from ijepa_enhanced.data.prepare import MANIFEST, check, prepare
from ijepa_enhanced.data.remote import fetch
from ijepa_enhanced.data.sources.open import is_remote, open_source
from ijepa_enhanced.errors import RequestError, RunError

logger = logging.getLogger(__name__)


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa prepare`."""
    command.add_argument(
        "source", type=str, help="the images, remote ones too; with --check, a folder that was prepared"
    )
    command.add_argument("out", type=str, nargs="?", default=None, help="folder for the shards")
    command.add_argument("--max-resolution", type=int, default=256, help="largest sqrt(height * width) in pixels")
    command.add_argument("--quality", type=int, default=90, help="of the JPEG files, 1 to 100")
    command.add_argument("--workers", type=int, default=1, help="processes that decode and encode; 0: this one does")
    command.add_argument("--shard-size", type=int, default=128, help="megabytes at which a shard is closed")
    command.add_argument("--check", action="store_true", help="compare a prepared folder with its checksums")


def run(options: Namespace) -> int:
    """Prepare a source, or check what was prepared."""
    return _check(options) if options.check else _prepare(options)


def _prepare(options: Namespace) -> int:
    if options.out is None:
        raise RequestError("Missing: out.")
    for name, least, most in (
        ("max_resolution", 1, None),
        ("quality", 1, 100),
        ("workers", 0, None),
        ("shard_size", 1, None),
    ):
        value, flag = options[name], f"--{name.replace('_', '-')}"
        if value < least or (most is not None and value > most):
            raise RequestError(f"{flag} must be at least {least}{f' and at most {most}' if most else ''}, not {value}.")
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
            options.workers,
            options.shard_size,
            lambda done, total: bar.update(encoded, completed=done, total=total),
        )
    if copies.exists():
        shutil.rmtree(copies)
    for image in manifest["dropped"][:LISTED]:
        logger.warning("Dropped: %s: %s", image["key"], image["reason"])
    if len(manifest["dropped"]) > LISTED:
        logger.warning("Dropped: %d more, which %s lists.", len(manifest["dropped"]) - LISTED, folder / MANIFEST)
    if not manifest["shards"]:
        raise RunError(f"None of the {len(manifest['dropped'])} images of {options.source} can be decoded.")
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


def _check(options: Namespace) -> int:
    if options.out is not None:
        raise RequestError("--check takes one folder, the one that was prepared.")
    problems = check(Path(options.source))
    if problems:
        raise RunError("\n  ".join([f"{options.source} is damaged:", *problems]))
    print(f"{options.source}: as it was prepared")
    print_json(options, {"problems": 0})
    return 0


COMMAND = Command("Re-encode a source into tar shards, small and fast to read.", add_options, run)
