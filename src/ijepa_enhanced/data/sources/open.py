"""`open_source`: from what the user wrote to a source of images."""

from __future__ import annotations

import itertools
import logging
import re
from glob import glob
from pathlib import Path

from ijepa_enhanced.data.sources.base import PARTS, Source
from ijepa_enhanced.data.sources.folder import FolderSource, cannot_list, is_image
from ijepa_enhanced.data.sources.lists import LISTS, ListSource
from ijepa_enhanced.data.sources.mixed import MixedSource
from ijepa_enhanced.data.sources.synthetic import SyntheticSource
from ijepa_enhanced.data.sources.tables import Columns, is_saved, open_hub, open_parquet, open_saved
from ijepa_enhanced.data.sources.tar import TarSource
from ijepa_enhanced.errors import SourceError

logger = logging.getLogger(__name__)

FOLDERS = (*PARTS, "validation")
"""What folders of parts are named."""


def open_source(spec: str, part: str = "train") -> Source:
    """The source that `spec` describes.

    Args:
        spec: `synthetic`; a folder of images, of tar shards, of Parquet files or of a data set that was saved with
            `save_to_disk`; tar or Parquet files, several as `train-{000..003}.tar` or `train-*.parquet`; a list of
            images, `.csv` or `.jsonl`; `hf://NAME` or `hf://NAME:SPLIT`. After Parquet and data sets
            `#image=COLUMN,label=COLUMN`, either or both, says what is in the columns, and `#config=NAME` after a data
            set of the Hub which of its configurations is meant; after tar shards, `#label=NAME` says which key of
            their members `KEY.json` holds the labels. Several of these with ` + ` between are mixed, see
            `MixedSource`, by the weights that follow them: `photos@2 + train-*.tar@1`.
        part: of the synthetic images; of a folder of files or a data set, the files or the split whose names begin
            with it.

    Raises:
        SourceError: there is no such source, or no image in it.
    """
    if " + " in spec and not Path(spec).expanduser().exists():
        mixed = [_split_weight(one.strip()) for one in spec.split(" + ")]
        return MixedSource([open_source(place, part) for place, _ in mixed], [weight for _, weight in mixed], spec)
    if spec == "synthetic":
        return SyntheticSource(part)
    if not spec:
        raise SourceError("The source name is empty. Give a folder, tar shards, or 'synthetic'.")
    place, columns = _split_columns(spec)
    if place.startswith("hf://"):
        return open_hub(place, part, columns)
    if is_remote(place):
        raise SourceError(f"{place} is a remote source. Run ijepa prepare {place} FOLDER, then use FOLDER.")
    path = Path(place).expanduser()
    if path.is_dir():
        if is_saved(path):
            return open_saved(path, place, part, columns)
        files = sorted(path.glob("*.tar")) or sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        files = _files_of(part, files, place)
        if not files:
            path = _folder_of(part, path)
        elif any(is_image(file.name) for file in path.iterdir()):
            logger.warning("%s contains image files besides %s. The image files are ignored.", place, files[0].name)
    else:
        files = _existing_files(str(path), spec)
    kind = files[0].suffix if files else ""
    if kind == ".parquet":
        return open_parquet(files, place, columns)
    if files and not (kind in LISTS and len(files) == 1):
        if "image" in columns:
            raise SourceError(f"{place} has no image column to choose. For tar shards, write only label=NAME after #.")
        return TarSource(files, spec, columns.get("label"))
    if columns:
        raise SourceError(f"{place} has no columns to choose. Remove the # and everything after it.")
    return ListSource(files[0]) if files else FolderSource(path)


def is_remote(spec: str) -> bool:
    """Whether a source is to be copied before it is opened: `PROTOCOL://...`, but for the Hub's."""
    return re.match(r"[a-z0-9]+://", spec) is not None and not spec.startswith("hf://")


def _split_weight(spec: str) -> tuple[str, float]:
    """What stands before the `@` of a weight, which the names of files may have too, and the weight, or 1."""
    weighted = re.fullmatch(r"(.+)@(\d+\.?\d*|\.\d+)", spec)
    if weighted is None or Path(spec).expanduser().exists():
        return spec, 1.0
    place, weight = weighted.groups()
    if not float(weight):
        raise SourceError(f"The weight of {place} is 0. Set a weight above 0, or remove {place}.")
    return place, float(weight)


def _split_columns(spec: str) -> tuple[str, Columns]:
    """What stands before and after the `#` of columns or a key, which the names of files may have too."""
    place, hash_sign, chosen = spec.partition("#")
    if not hash_sign or Path(spec).expanduser().exists():
        return spec, {}
    columns = dict(column.partition("=")[::2] for column in chosen.split(","))
    allowed = {"image", "label"} | ({"config"} if place.startswith("hf://") else set())
    if not columns.keys() <= allowed:
        raise SourceError(
            f"{spec}: after #, write image=COLUMN, label=COLUMN or both, separated by a comma. "
            "Data sets of the Hub accept config=NAME too, tar shards only label=NAME."
        )
    return place, columns


def _files_of(part: str, files: list[Path], folder: str) -> list[Path]:
    """Those of a folder's files whose names begin with `part`, or all where they are not named after parts."""
    named = [file for file in files if file.name.startswith(part)]
    others = [other for other in PARTS if any(file.name.startswith(other) for file in files)]
    if not named and others:
        raise SourceError(
            f"{folder} has files for {' and '.join(others)}, but none for {part}. Name the files to use, "
            f"such as {folder}/{others[0]}*{files[0].suffix}."
        )
    return named or files


def _folder_of(part: str, folder: Path) -> Path:
    """What lies in a folder for `part`, where all in it are folders named after parts; else the folder itself."""
    try:
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        cannot_list(error)
    if not inside or not all(entry.is_dir() and entry.name in FOLDERS for entry in inside):
        return folder
    named = [entry for entry in inside if entry.name.startswith(part)]
    if not named:
        raise SourceError(f"{folder} has {' and '.join(entry.name for entry in inside)}, and nothing for {part}.")
    return named[0]


def _existing_files(pattern: str, spec: str) -> list[Path]:
    """The files of a pattern with braces and asterisks."""
    files = [Path(name) for expanded in expand(pattern) for name in sorted(glob(expanded)) or [expanded]]
    missing = [str(file) for file in files if not file.is_file()]
    if len(files) > 1 and missing:
        raise SourceError(
            f"{len(missing)} of the {len(files)} files of {spec} are missing, the first is {missing[0]}. "
            "Check the pattern, or fetch them."
        )
    if missing:
        raise SourceError(
            f"No such file or folder: {spec}. Images are a folder, tar shards such as train-{{000000..000002}}.tar, "
            "Parquet files, a CSV or JSONL list, hf://NAME, or 'synthetic'."
        )
    return files


def expand(pattern: str) -> list[str]:
    """The names of a pattern with {a,b} and {000..012} as a shell expands them."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if number % 2 == 0 else _choices(part) for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(part: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", part)
    if counted is None:
        return part.split(",")
    first, last = counted.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
