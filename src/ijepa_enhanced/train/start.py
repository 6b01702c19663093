"""What a run begins with: random weights, those of a trained encoder, and perhaps a teacher that does not change."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.listing import Statistics
from ijepa_enhanced.data.statistics import statistics_of
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.files import replacing
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.inflate import inflated
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.pretrained import license_of, read_json
from ijepa_enhanced.train.config import TrainConfig

logger = logging.getLogger(__name__)

STATISTICS = "statistics.json"
"""File in a run's folder with the mean and standard deviation of each channel of its images, if they are not RGB."""
START = "start"
"""The encoder in a run's folder that the run started from, if it did not start from random weights."""
TEACHER = "teacher"
"""The teacher in a run's folder, if it does not change. Checkpoints do not contain it."""


@dataclass(frozen=True)
class Start:
    """The encoders that a run begins with."""

    encoder: Encoder | None
    """What the student starts from; None: random weights."""
    teacher: Encoder | None
    """A teacher that does not change; None: a moving average of the student."""
    statistics: Statistics | None = None
    """Of the channels of the images, if they are not RGB and the encoder does not know them."""

    def architecture(self, config: TrainConfig) -> Architecture:
        """Return the architecture of the student."""
        if self.encoder is not None:
            return self.encoder.config
        return dataclasses.replace(config.encoder.architecture, channels=config.data.channels)

    def measured(self, catalog: Catalog, config: TrainConfig, ranks: Ranks) -> Start:
        """Return the start for images that are not RGB: with channel statistics, and an encoder for this number of
        channels.

        Raises:
            SourceError: a channel is constant, or no image can be measured.
        """
        channels = config.data.channels
        own = CHANNELS if self.encoder is None else self.encoder.config.channels
        statistics = self.statistics
        if own == channels or catalog.source is None:
            return self
        if statistics is None:
            with ranks.one_first():
                statistics = statistics_of(catalog.source, channels)
            statistics = ranks.gather(statistics)[0]
        encoder = self.encoder
        if encoder is not None:
            logger.info(
                "The patch embedding of %s is for %d channels: each of the %d channels of the images gets their mean.",
                config.init,
                own,
                channels,
            )
            how = dataclasses.replace(encoder.preprocessing, **_of_channels(statistics))
            encoder = Encoder(inflated(encoder.network, channels), how, encoder.origin, encoder.record)
        return dataclasses.replace(self, encoder=encoder, statistics=statistics)

    def keep(self, folder: Path) -> None:
        """Write the encoders into the folder of the run, so that it resumes without the files that they come from.

        Raises:
            OSError: a file cannot be written, as on a full disk.
        """
        for name, encoder in ((START, self.encoder), (TEACHER, self.teacher)):
            if encoder is not None:
                encoder.save_pretrained(folder / name)
        if self.statistics is not None:
            with replacing(folder / STATISTICS) as temporary:
                temporary.write_text(json.dumps(dataclasses.asdict(self.statistics), indent=2) + "\n")

    @property
    def origin(self) -> Origin | None:
        """Return where the weights come from that the student starts from, with their license."""
        return None if self.encoder is None else self.encoder.origin

    @property
    def teacher_license(self) -> str | None:
        """Return the license of the teacher's weights; None: there is no such teacher, or its license is unknown."""
        return self.teacher.origin.license if self.teacher and self.teacher.origin else None

    def preprocessing(self, config: TrainConfig, longest: tuple[int, int]) -> Preprocessing:
        """Return the preprocessing of the encoder that is trained.

        Args:
            config: of the run.
            longest: rows and columns of the longest grids of training.
        """
        before = Preprocessing() if self.encoder is None else self.encoder.preprocessing
        if self.encoder is None and self.statistics is not None:
            before = Preprocessing(**_of_channels(self.statistics))
        architecture = self.architecture(config)
        grid = None
        # Other positions have no untrained part, or are resized to every grid.
        if architecture.positions == "factorized" and architecture.resampling == "squeeze":
            rows, cols = before.trained_grid or (0, 0)
            grid = (max(rows, longest[0]), max(cols, longest[1]))
        resolution = config.data.max_resolution
        if resolution is not None:  # views are scaled down to the limit
            resolution = min(resolution, int(math.sqrt(config.data.view_limit) * architecture.patch_size))
        return dataclasses.replace(before, resolution=resolution, trained_grid=grid)


def load_start(config: TrainConfig, folder: Path, resume: bool, initial: Encoder | None = None) -> Start:
    """Load the encoders that a run begins with.

    Args:
        config: of the run.
        folder: of the run.
        resume: whether it resumes. It then uses the encoders that it has kept in `folder`.
        initial: the encoder of `config.init`, if it is loaded already.

    Raises:
        EncoderError: an encoder cannot be loaded.
    """

    def kept_or_given(name: str, given: str | None, loaded: Encoder | None = None) -> Encoder | None:
        if given is None:
            return None
        # config.json is written last: a run that was killed before has only the weights that it was given.
        whole = resume and (folder / name / "config.json").is_file()
        if whole or loaded is None:
            loaded = Encoder.from_pretrained(folder / name if whole else given)
        if not whole:
            loaded.origin = loaded.origin or origin_of(loaded, given)
        return loaded

    start, teacher = kept_or_given(START, config.init, initial), kept_or_given(TEACHER, config.teacher)
    check_channels(start, teacher, config)
    for what, given, encoder in (
        ("Starting from", config.init, start),
        ("Predicting the features of", config.teacher, teacher),
    ):
        if encoder is not None and encoder.origin is not None and not resume:
            terms = encoder.origin.license or "unknown"
            logger.info("%s %s. Its license (%s) applies to what is trained from it too.", what, given, terms)
    measured = read_json(folder / STATISTICS) if resume else None
    return Start(start, teacher, Statistics(**measured) if measured else None)


def check_channels(start: Encoder | None, teacher: Encoder | None, config: TrainConfig) -> None:
    """Check that the encoders suit the images. Weights for RGB can start an encoder for other channels.

    Raises:
        EncoderError: an encoder does not suit the images.
    """
    for option, name, encoder, others in (
        ("init", config.init, start, (CHANNELS,)),
        ("teacher", config.teacher, teacher, ()),
    ):
        if encoder is not None and encoder.config.channels not in (config.data.channels, *others):
            found = encoder.config.channels
            raise EncoderError(
                f"{option} {name} is an encoder of images with {found} channels, but data.channels is "
                f"{config.data.channels}. Set data.channels to {found}, or use another encoder."
            )


def _of_channels(statistics: Statistics) -> dict[str, Any]:
    """Return the fields of `Preprocessing` that depend on the channels."""
    return {
        "channels": len(statistics.mean),
        "mean": tuple(statistics.mean),
        "std": tuple(statistics.std),
    }


def origin_of(encoder: Encoder, name: str) -> Origin | None:
    """Return the origin of what is trained from an encoder of ours; None if it is neither on the Hub nor licensed."""
    place, training = Path(name), encoder.record.training or {}
    terms = license_of(encoder.record.card) or training.get("teacher_license")
    if not place.exists():  # a Hub id
        return Origin(name, "ijepa-enhanced", terms)
    return Origin(place.resolve().name, "ijepa-enhanced", terms) if terms else None
