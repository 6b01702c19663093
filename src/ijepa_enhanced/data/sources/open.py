"""`open_source`: from what the user wrote to a source of images."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ijepa_enhanced.data.sources.base import PARTS, Source
from ijepa_enhanced.data.sources.folder import FolderSource, cannot_list, is_image
from ijepa_enhanced.data.sources.lists import LISTS, ListSource
from ijepa_enhanced.data.sources.mixed import MixedSource
from ijepa_enhanced.data.sources.patterns import existing_files
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
        raise SourceError("The name of the images is empty: give a folder, tar shards, or 'synthetic'.")
    place, columns = _split_columns(spec)
    if place.startswith("hf://"):
        return open_hub(place, part, columns)
    if is_remote(place):
        raise SourceError(f"{place} is not on this machine: copy it by ijepa prepare {place} FOLDER, and take FOLDER.")
    path = Path(place).expanduser()
    if path.is_dir():
        if is_saved(path):
            return open_saved(path, place, part, columns)
        files = sorted(path.glob("*.tar")) or sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        files = _files_of(part, files, place)
        if not files:
            path = _folder_of(part, path)
        elif any(is_image(file.name) for file in path.iterdir()):
            logger.warning("%s holds image files beside %s: they are not taken.", place, files[0].name)
    else:
        files = existing_files(str(path), spec)
    kind = files[0].suffix if files else ""
    if kind == ".parquet":
        return open_parquet(files, place, columns)
    if files and not (kind in LISTS and len(files) == 1):
        if "image" in columns:
            raise SourceError(f"{place} has no columns of images: after # comes label=NAME alone for tar shards.")
        return TarSource(files, spec, columns.get("label"))
    if columns:
        raise SourceError(f"There is nothing to choose in {place}: leave out what follows #.")
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
        raise SourceError(f"The weight of {place} is 0: give it another, or leave {place} out.")
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
            f"{spec}: after # come image=COLUMN and label=COLUMN, either or both, with a comma between; "
            "for the Hub's data sets config=NAME too, for tar shards label=NAME alone."
        )
    return place, columns


def _files_of(part: str, files: list[Path], folder: str) -> list[Path]:
    """Those of a folder's files whose names begin with `part`, or all where they are not named after parts."""
    named = [file for file in files if file.name.startswith(part)]
    others = [other for other in PARTS if any(file.name.startswith(other) for file in files)]
    if not named and others:
        raise SourceError(
            f"{folder} has files for {' and '.join(others)}, and none for {part}: name those to take, "
            f"as {folder}/{others[0]}*{files[0].suffix}."
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
