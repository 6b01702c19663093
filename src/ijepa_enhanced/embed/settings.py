"""What the rows of an embedding folder depend on, and the file that records it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_enhanced.encoder import Encoder, hash_weights
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import replacing

FORMAT = 1
"""Version of the settings and of the columns. Raise it when older folders can no longer be read or continued."""

FILE = "_embedding.json"
"""The file in the folder that holds the settings. Programs that read a folder of Parquet files ignore names that begin
with an underscore."""

METADATA = b"ijepa_enhanced"
"""Key of a Parquet file's schema metadata that holds the settings, as JSON."""

LEAST_ROWS = 1024
"""Rows of a file, unless there would be more than `MOST_FILES`. A process that is killed loses at most one file."""
MOST_FILES = 1000


@dataclass(frozen=True)
class EmbedSettings:
    """What the rows depend on, so that a run can be continued and a query embedded in the same way."""

    encoder: str
    """The encoder's folder, or what else the user called it."""
    encoder_hash: str
    """See `hash_encoder`."""
    source: str
    """What the user called the images."""
    source_hash: str
    """The hash of their catalog."""
    images: int
    """N, the rows of all files: every image of the source, readable or not."""
    width: int
    """D."""
    resolution: int | None
    """sqrt(height * width) of the resized images in pixels; None is native size."""
    merge_rate: float
    precision: str
    """Of matrix products: float32 or bfloat16."""
    dtype: str
    """Of the stored features: float32 or float16."""
    layers: int
    """Number of last layers whose features are stored. 1: only the last one."""
    tokens: bool
    """Whether the features of patches are stored too."""
    file_format: str
    """parquet, npy or csv."""
    pooling: str = "mean"
    """How tokens become the feature of an image, see `Preprocessing`."""
    format: int = FORMAT

    @property
    def rows_per_file(self) -> int:
        """Return the number of rows of every file but the last."""
        return max(LEAST_ROWS, -(-self.images // MOST_FILES))

    @property
    def files(self) -> int:
        """Return the number of files that hold all rows."""
        return -(-self.images // self.rows_per_file)

    def rows_of(self, file: int) -> range:
        """Return the rows of a file, which are rows of the source."""
        start = file * self.rows_per_file
        return range(start, min(self.images, start + self.rows_per_file))

    def name_of(self, file: int) -> str:
        """Return the name of a file, without its extension."""
        return f"part-{file:05d}-of-{self.files:05d}"

    def vectors(self, depth: int) -> list[str]:
        """Return the names of the columns of features, from the first kept layer of an encoder to the last layer."""
        return [*(f"layer_{depth - self.layers + 1 + number}" for number in range(self.layers - 1)), "embedding"]

    def to_json(self) -> str:
        """Return the settings as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


DESCRIBED = {
    "encoder_hash": "of another encoder ({encoder})",
    "source_hash": "of other images, or images that have changed since ({source})",
    "resolution": "with another --resolution",
    "merge_rate": "with another --merge-rate",
    "dtype": "with another --dtype",
    "layers": "with another number of --layers",
    "tokens": "with another setting of --tokens",
    "file_format": "with another --format",
}
"""How a message names a setting that differs. `encoder` and `source` are only names, and may differ."""


def hash_encoder(encoder: Encoder) -> str:
    """Return the SHA-256 of an encoder's weights, architecture and preprocessing."""
    digest = hashlib.sha256(repr((encoder.config, encoder.preprocessing)).encode())
    digest.update(hash_weights(encoder).encode())
    return digest.hexdigest()


def save_settings(settings: EmbedSettings, folder: Path) -> EmbedSettings:
    """Write the settings into a folder, or return those that it already has.

    Of several processes that start together, one writes, and the others get what it has written.

    Raises:
        RequestError: the file that is there cannot be read.
        OSError: the file cannot be written.
    """
    path = folder / FILE
    with suppress(FileExistsError), replacing(path, new=True) as temporary:
        temporary.write_text(settings.to_json() + "\n")
    return load_settings(folder)


def load_settings(folder: Path) -> EmbedSettings:
    """Read the settings in a folder.

    Raises:
        RequestError: the folder was not written by `ijepa embed`, or by another version of it.
    """
    if not folder.is_dir():
        raise RequestError(f"No such folder: {folder}. `ijepa embed` writes one.")
    try:
        values: dict[str, Any] = json.loads((folder / FILE).read_text())
        if values["format"] != FORMAT:
            raise RequestError(
                f"{folder} was written by another version of ijepa-enhanced. Run `ijepa embed` again, with another "
                "output folder."
            )
        return EmbedSettings(**values)
    except FileNotFoundError as error:
        raise RequestError(f"{folder} contains no embeddings: it has no {FILE}. Run `ijepa embed` first.") from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{folder / FILE} cannot be read: {error}.") from error


def check_same(saved: EmbedSettings, wanted: EmbedSettings, folder: Path) -> None:
    """Check that rows with the wanted settings can join those in a folder.

    Raises:
        RequestError: a setting differs; the message names the first that does, with both values.
    """
    for name, words in DESCRIBED.items():
        old, new = getattr(saved, name), getattr(wanted, name)
        if old != new:
            shown = words.format_map(vars(saved))
            if shown == words:
                shown += f" ({'native' if old is None else old}, not {'native' if new is None else new})"
            raise RequestError(f"{folder} contains embeddings {shown}. Choose another output folder.")
