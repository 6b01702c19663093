"""`ijepa embed`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.progress import TextColumn

from ijepa_enhanced.commands.options import EmbedOptions
from ijepa_enhanced.commands.setup import check_workers, counting_bars, hush_others, print_counts, print_json
from ijepa_enhanced.data.catalog import open_catalog, report_notes
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast_dtype, default_workers
from ijepa_enhanced.distributed import WORK_TIMEOUT, is_one_of_many, ranks_of_run
from ijepa_enhanced.embed import on_ray
from ijepa_enhanced.embed.plan import EmbedPlan, files_of_shard
from ijepa_enhanced.embed.rows import RowTables
from ijepa_enhanced.embed.run import (
    Engine,
    Progress,
    count_rows,
    embed_files,
    local_engine,
    missing_files,
)
from ijepa_enhanced.embed.settings import (
    EmbedSettings,
    check_same,
    hash_encoder,
    save_settings,
)
from ijepa_enhanced.encoder import TOKENS_PER_PACK, Encoder, tokens_at_once
from ijepa_enhanced.errors import RequestError, RunError
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.files import make_folder, remove_partials

logger = logging.getLogger(__name__)


def run(options: EmbedOptions) -> int:
    """Write the features of a source; under `torchrun` the ranks share the packs.

    Raises:
        UserError: the request is wrong, or a feature is not finite.
    """
    hush_others()
    if options.engine == "ray" and is_one_of_many():
        raise RequestError(
            "--engine ray does not run under torchrun, because Ray starts its own processes. Run it alone."
        )
    workers = default_workers() if options.workers is None else options.workers
    check_workers(workers, "--workers")
    ray = options.engine == "ray"
    with ranks_of_run(WORK_TIMEOUT) as ranks, on_ray.ray_cluster() if ray else nullcontext():
        encoder = Encoder.from_pretrained(options.weights).to(ranks.device)
        with ranks.one_first():
            source = open_source(options.source)
            catalog = open_catalog(source)
        report_notes(source)
        if not len(catalog.rows):
            raise RunError(f"None of the {len(source)} images of {options.source} can be read.")
        own = encoder.device, autocast_dtype("auto", encoder.device)
        device, precision = on_ray.device_of_actors() if ray else own
        settings = wanted(options, encoder, source, precision)
        ranks.agree({"images": settings.source_hash, "encoder": settings.encoder_hash, "PyTorch": torch.__version__})
        folder, files = Path(options.out), files_of_shard(settings.files, options.part())
        settings, missing = ranks.gather(opened(folder, settings, files, options) if ranks.main else None)[0]
        config = InferenceConfig(
            settings.resolution,
            getattr(torch, settings.precision),
            settings.merge_rate,
            workers,
            TOKENS_PER_PACK,
            ranks,
        )
        network = encoder.config
        budget = tokens_at_once(device, TOKENS_PER_PACK)
        plan = EmbedPlan(settings, catalog, network.patch_size, TOKENS_PER_PACK, budget)
        tables = RowTables(settings, source, network.depth)
        with progress_bar(plan, missing) as progress:
            images = LabelledSource(source, catalog)
            local = local_engine(encoder, images, plan, config, progress.clock)
            engine = on_ray.ray_engine(plan, network) if ray else local
            write(plan, missing, engine, tables, folder if ranks.main else None, progress)
        if ranks.main:
            finish(options, settings, files, progress)
    return 0


def wanted(options: EmbedOptions, encoder: Encoder, source: Source, precision: torch.dtype) -> EmbedSettings:
    """Return the settings that the options ask for.

    Args:
        options: of the command.
        encoder: embeds the images.
        source: the images, with their catalog attached.
        precision: of matrix products.

    Raises:
        RequestError: the encoder has fewer layers.
    """
    depth = encoder.config.depth
    if options.layers > depth:
        raise RequestError(
            f"--layers must be at most {depth}, the number of layers of the encoder, not {options.layers}."
        )
    return EmbedSettings(
        whole_path(options.weights),
        hash_encoder(encoder),
        whole_path(options.source),
        source.listing.hash,
        len(source),
        encoder.width,
        encoder.pixels(options.resolution),
        options.merge_rate,
        str(precision).removeprefix("torch."),
        options.dtype,
        options.layers,
        options.tokens,
        options.format,
        encoder.preprocessing.pooling,
    )


def whole_path(name: str) -> str:
    """Return the absolute path of what exists on this machine. Other names, such as those on the Hub, stay."""
    return os.path.abspath(name) if os.path.exists(name) else name


def opened(
    folder: Path, settings: EmbedSettings, files: Sequence[int], options: EmbedOptions
) -> tuple[EmbedSettings, list[int]]:
    """Prepare the output folder, and return the settings of its rows and the files that are missing.

    Raises:
        RequestError: the folder cannot be created, or contains other rows; or it contains these files and --resume is
            not given.
        OSError: the folder cannot be written to.
    """
    if Path(options.source).is_dir() and folder.resolve().is_relative_to(Path(options.source).resolve()):
        raise RequestError(
            f"--out {folder} is inside {options.source}, where its files would be read as images or tables. Choose a "
            "folder elsewhere."
        )
    if not files:
        logger.warning("--shard %s contains no file, because there are only %d.", options.shard, settings.files)
    make_folder(folder)
    # Those that are there, with their names and their precision: another machine may choose another one.
    saved = save_settings(settings, folder)
    check_same(saved, settings, folder)
    settings = saved
    missing = missing_files(folder, settings, files)
    there = len(files) - len(missing)
    if there and not options.resume:
        raise RequestError(
            f"{folder} already contains {there} of {len(files)} files. Add --resume to continue, or choose another "
            "output folder."
        )
    for file in missing:
        remove_partials(folder, settings.name_of(file))
    if there:
        logger.info("Continuing: %d of %d files are complete.", there, len(files))
    return settings, missing


@contextmanager
def progress_bar(plan: EmbedPlan, files: Sequence[int]) -> Iterator[Progress]:
    """Show a bar on stderr if that is a terminal, and yield what counts the readable images of some files."""
    with counting_bars(TextColumn("{task.fields[speed]}", markup=False)) as bar:
        parts = map(plan.readable, files)
        total = sum(part.stop - part.start for part in parts)
        task = bar.add_task("Embedding", total=total, speed="")
        yield Progress(lambda done, speed: bar.update(task, completed=done, speed=speed))


def write(
    plan: EmbedPlan,
    files: Sequence[int],
    engine: Engine,
    tables: RowTables,
    folder: Path | None,
    progress: Progress,
) -> None:
    """Write files; see `embed_files`.

    Raises:
        RunError: the run is interrupted, a process is killed, or a file cannot be written. It can be continued.
    """
    try:
        embed_files(plan, files, engine, tables, folder, progress)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "A process that decodes images was killed, which happens if memory is full. Use fewer --workers, and run "
            "the same command with --resume."
        ) from error
    except KeyboardInterrupt as error:
        raise RunError("Interrupted. To continue, run the same command with --resume.") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # without what pyarrow writes around it
        raise RunError(
            f"Cannot write to {folder}: {reason}. When this is solved, run the same command with --resume."
        ) from error


def finish(options: EmbedOptions, settings: EmbedSettings, files: Sequence[int], progress: Progress) -> None:
    """Print what the folder contains now."""
    folder = Path(options.out)
    speed = progress.images / progress.seconds if progress.images else None  # before the files are read again
    counts = dataclasses.asdict(count_rows(folder, settings, files))
    if counts["unreadable"]:
        logger.warning("Images that cannot be decoded: %d. The column `error` says why.", counts["unreadable"])
    print_counts(counts | ({} if speed is None else {"images_per_second": f"{speed:.1f}"}))
    print(folder)
    print_json(options, counts | {"images_per_second": speed})
