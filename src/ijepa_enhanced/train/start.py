"""What a run begins with: random weights, those of a trained encoder, and perhaps a teacher that does not change."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing
from ijepa_enhanced.pretrained import license_of
from ijepa_enhanced.train.config import TrainConfig

logger = logging.getLogger(__name__)

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

    def architecture(self, config: TrainConfig) -> Architecture:
        """Return the architecture of the student."""
        return config.encoder.architecture if self.encoder is None else self.encoder.config

    def keep(self, folder: Path) -> None:
        """Write the encoders into the folder of the run, so that it resumes without the files that they come from.

        Raises:
            OSError: a file cannot be written, as on a full disk.
        """
        for name, encoder in ((START, self.encoder), (TEACHER, self.teacher)):
            if encoder is not None:
                encoder.save_pretrained(folder / name)

    @property
    def origin(self) -> Origin | None:
        """Return where the weights come from that the student starts from, with their license."""
        return None if self.encoder is None else self.encoder.origin

    def preprocessing(self, config: TrainConfig, longest: tuple[int, int]) -> Preprocessing:
        """Return the preprocessing of the encoder that is trained.

        Args:
            config: of the run.
            longest: rows and columns of the longest grids of training.
        """
        before = Preprocessing() if self.encoder is None else self.encoder.preprocessing
        architecture = self.architecture(config)
        grid = None
        # Other positions have no untrained part, or are resized to every grid.
        if architecture.positions == "factorized" and architecture.resampling == "squeeze":
            rows, cols = before.trained_grid or (0, 0)
            grid = (max(rows, longest[0]), max(cols, longest[1]))
        return dataclasses.replace(before, resolution=config.data.max_resolution, trained_grid=grid)


def load_start(config: TrainConfig, folder: Path, resume: bool) -> Start:
    """Load the encoders that a run begins with.

    Args:
        config: of the run.
        folder: of the run.
        resume: whether it resumes. It then uses the encoders that it has kept in `folder`.

    Raises:
        EncoderError: an encoder cannot be loaded.
    """

    def kept_or_given(name: str, given: str | None) -> Encoder | None:
        if given is None:
            return None
        # config.json is written last: a run that was killed before has only the weights that it was given.
        whole = resume and (folder / name / "config.json").is_file()
        encoder = Encoder.from_pretrained(folder / name if whole else given)
        if not whole:
            encoder.origin = encoder.origin or origin_of(encoder, given)
        return encoder

    start, teacher = kept_or_given(START, config.init), kept_or_given(TEACHER, config.teacher)
    if start is not None and start.origin is not None and not resume:
        terms = start.origin.license or "unknown"
        logger.info("Starting from %s. Its license (%s) applies to what is trained from it too.", config.init, terms)
    return Start(start, teacher)


def origin_of(encoder: Encoder, name: str) -> Origin | None:
    """Return the origin of what is trained from an encoder of ours; None if it is neither on the Hub nor licensed."""
    terms, place = license_of(encoder.record.card), Path(name)
    if not place.exists():  # a Hub id
        return Origin(name, "ijepa-enhanced", terms)
    return Origin(place.resolve().name, "ijepa-enhanced", terms) if terms else None
