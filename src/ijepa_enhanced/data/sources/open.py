"""`open_source`: from what the user wrote to a source of images."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from ijepa_enhanced.data.sources.base import CLASSES, Source
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.lists import LISTS, ListSource
from ijepa_enhanced.data.sources.mixed import MixedSource
from ijepa_enhanced.data.sources.names import count_kinds, hidden, is_image, split_word
from ijepa_enhanced.data.sources.patterns import existing_files
from ijepa_enhanced.data.sources.splits import choose_files, choose_folder, folders_of_images
from ijepa_enhanced.data.sources.synthetic import NAMES, SyntheticSource
from ijepa_enhanced.data.sources.tables import Columns, is_saved, open_hub, open_parquet, open_saved
from ijepa_enhanced.data.sources.tar import TarSource
from ijepa_enhanced.errors import SourceError


def open_source(spec: str, part: str = "train") -> Source:
    """The source that `spec` describes.

    Args:
        spec: `synthetic` or `synthetic-bands`; a folder of images, of tar shards, of Parquet files or of a data set
            that was saved with `save_to_disk`; tar or Parquet files, several as `train-{000..003}.tar` or
            `train-*.parquet`; a list of images, `.csv` or `.jsonl`; `hf://NAME` or `hf://NAME:SPLIT`. After Parquet and
            data sets `#image=COLUMN,label=COLUMN`, either or both, says what is in the columns, and `#config=NAME`
            after a data set of the Hub which of its configurations is meant; after tar shards, `#label=NAME` says which
            key of their members `KEY.json` holds the labels. Several of these with ` + ` between are mixed, see
            `MixedSource`, by the weights that follow them: `photos@2 + train-*.tar@1`.
        part: `train`, `val` or `test`; see `splits` for what belongs to it.

    Raises:
        SourceError: there is no such source, or no image in it.
    """
    if " + " in spec and not _exists(spec):
        mixed = [_split_weight(one.strip()) for one in spec.split(" + ")]
        return MixedSource([open_source(place, part) for place, _ in mixed], [weight for _, weight in mixed], spec)
    if spec in NAMES:
        return SyntheticSource(part, spec)
    if "\0" in spec:
        raise SourceError(f"{spec!r} contains a null byte, which no path can. Remove it.")
    if not spec:
        raise SourceError("The source of the images is empty. Set it to a folder, tar shards or 'synthetic'.")
    place, columns = _split_columns(spec)
    if place.startswith("hf://"):
        return open_hub(place, part, columns)
    if is_remote(place):
        raise SourceError(f"{place} is a remote source. Run ijepa prepare {place} FOLDER, then use FOLDER.")
    path = Path(_expanded(place))
    if os.path.isdir(path):  # where `Path.is_dir` fails on a pattern that is too long for a path
        return _open_folder(path, place, spec, part, columns)
    files = existing_files(str(path), spec)
    if len(files) == 1 and files[0].suffix.lower() in LISTS:
        _check_no_columns(place, columns)
        return ListSource(files[0])
    return _open_shards(files, place, spec, columns)


def anchored(spec: str) -> str:
    """Return a source with absolute paths, so that it means the same images in any current folder."""
    if " + " in spec and not _exists(spec):
        parts = [one.strip() for one in spec.split(" + ")]
        places = [_split_weight(one)[0] for one in parts]
        return " + ".join(anchored(place) + one.removeprefix(place) for one, place in zip(parts, places, strict=True))
    if not spec or spec in NAMES or spec.startswith("hf://") or is_remote(spec):
        return spec
    return os.path.abspath(_expanded(spec))


def _open_folder(folder: Path, place: str, spec: str, part: str, columns: Columns) -> Source:
    """Return what a folder holds for a part: a saved data set, shards or images."""
    if (folder / "config.yaml").is_file() and (folder / "log.jsonl").is_file():
        raise SourceError(f"{place} is the folder of a run, not of images.")
    if is_saved(folder):
        return open_saved(folder, place, part, columns)
    inside, split, others = choose_folder(part, folder)
    if is_saved(inside):
        return open_saved(inside, place, part, columns)
    shards = _shards(folder)
    if split:
        # An archive that lies beside the folders made from it is not read. Shards named after splits can be meant.
        named = [shard.name for shard in shards if split_word(shard.name)]
        if named:
            raise SourceError(
                f"{folder} is ambiguous: {named[0]} and the folder {inside.name} are both named after splits. Choose "
                f"one, for example {inside}."
            )
        shards = _shards(inside)
    beside = [entry.name for entry in _files(folder) if entry not in shards] if split else []
    if not shards:
        _check_no_columns(place, columns)
        source: Source = FolderSource(inside)
    else:
        others = [*others, *folders_of_images(inside, shards)]
        chosen, words = choose_files(part, shards, place)
        split = ", ".join(filter(None, (split, words)))
        source = _open_shards(chosen, place, spec, columns)
        known = {CLASSES, "manifest.json"}
        known |= {shard.name for shard in shards if shard in chosen or split_word(shard.name)}
        beside += [entry.name for entry in _files(inside) if entry.name not in known]
    source.split = split
    source.beside = count_kinds(beside)
    if others:
        source.beside = source.beside | {f"folder{'s' * (len(others) > 1)} of images": len(others)}
    return source


def _open_shards(files: list[Path], place: str, spec: str, columns: Columns) -> Source:
    if files[0].suffix.lower() == ".parquet":
        return open_parquet(files, place, columns)
    if is_image(files[0].name):
        raise SourceError(f"{files[0]} is an image. Use its folder, or list images in a CSV file.")
    if "image" in columns:
        raise SourceError(f"{place}: tar shards have no image column. Only label=NAME can follow the #.")
    return TarSource(files, spec, columns.get("label"))


def _shards(folder: Path) -> list[Path]:
    """Return the shards in a folder, of one kind."""
    patterns = ("*.tar", "*.parquet", "data/*.parquet")
    found = ([file for file in sorted(folder.glob(each)) if not hidden(file.name)] for each in patterns)
    return next(filter(None, found), [])


def _files(folder: Path) -> list[Path]:
    """Return the files in a folder, and whatever is hidden."""
    return sorted(entry for entry in folder.iterdir() if entry.is_file() or hidden(entry.name))


def _check_no_columns(place: str, columns: Columns) -> None:
    if columns:
        raise SourceError(f"{place} has no columns. Remove the # and everything after it.")


def is_remote(spec: str) -> bool:
    """Return whether a source is copied before it is opened: `PROTOCOL://...`, except the Hub's."""
    return re.match(r"[a-z0-9]+://", spec) is not None and not spec.startswith("hf://")


def _expanded(place: str) -> str:
    """Replace a leading `~` with the home folder. Return the path unchanged if this is impossible."""
    try:
        return os.path.expanduser(place)  # `Path.expanduser` fails for a user that does not exist
    except ValueError:  # no user has such a name, with a null byte or half of a surrogate pair
        return place


def _exists(spec: str) -> bool:
    """Return whether `spec` is a path; patterns may be too long for one, which `Path.exists` fails on."""
    return os.path.exists(_expanded(spec))


def _split_weight(spec: str) -> tuple[str, float]:
    """What stands before the `@` of a weight, which the names of files may have too, and the weight, or 1."""
    weighted = re.fullmatch(r"(.+)@(\d+\.?\d*|\.\d+)", spec)
    if weighted is None or _exists(spec):
        return spec, 1.0
    place, weight = weighted.groups()
    if not float(weight):
        raise SourceError(f"The weight of {place} is 0. Set a weight above 0, or leave {place} out of the mixture.")
    if math.isinf(float(weight)):
        raise SourceError(f"The weight of {place} is too large. Only the ratios of the weights matter.")
    return place, float(weight)


def _split_columns(spec: str) -> tuple[str, Columns]:
    """What stands before and after the `#` of columns or a key, which the names of files may have too."""
    place, hash_sign, chosen = spec.partition("#")
    if not hash_sign or _exists(spec):
        return spec, {}
    columns = dict(column.partition("=")[::2] for column in chosen.split(","))
    allowed = {"image", "label"} | ({"config"} if place.startswith("hf://") else set())
    if not columns.keys() <= allowed:
        raise SourceError(
            f"{spec}: only image=COLUMN, label=COLUMN or both, separated by a comma, can follow the #. hf:// datasets "
            "also accept config=NAME. Tar shards accept only label=NAME."
        )
    return place, columns
