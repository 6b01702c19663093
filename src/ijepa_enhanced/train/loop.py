"""The training loop: open the images, plan the packs, restore a checkpoint, train, save."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import torch
import yaml
from torch import Tensor

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.in_memory import InMemory
from ijepa_enhanced.data.loader import PackDataset, check_shared_memory, make_loader
from ijepa_enhanced.data.plan import EpochPlan, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import SHARED_MEMORY, autocast, autocast_dtype, free_memory
from ijepa_enhanced.distributed import Ranks, ranks_of_run
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.files import make_folder, remove_partials, replacing
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.masks import MIN_TOKENS
from ijepa_enhanced.models.preprocessing import Record
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import ProgressBar, RunLog
from ijepa_enhanced.train.meter import MOST_WAITING, SETTLED, advice, describe
from ijepa_enhanced.train.monitor import Monitor, start_monitor
from ijepa_enhanced.train.optimizer import make_optimizer, step_settings
from ijepa_enhanced.train.record import training_facts
from ijepa_enhanced.train.signals import StopSignals
from ijepa_enhanced.train.start import Start, load_start
from ijepa_enhanced.train.state import TrainState
from ijepa_enhanced.train.step import train_step
from ijepa_enhanced.train.unreadable import Unreadable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of `train`."""

    steps: int
    """Steps done since the start of the run."""
    images: int
    """Images shown since the start of the run, counted each time."""
    finished: bool
    """False if a signal stopped the run, which can then be resumed."""


def train(config: TrainConfig, folder: Path, resume: bool = False) -> Outcome:
    """Train, and write logs, checkpoints and encoders into `folder`.

    `folder/encoder` is the last teacher, and `folder/best` the best teacher so far by the monitor. Under `torchrun`,
    the ranks share the packs of every step, and rank 0 writes.

    Args:
        config: of the run.
        folder: of the run.
        resume: continue from the newest checkpoint in `folder`, or from the start if there is none. On the CPU, with
            the same number of threads and the same versions, the result equals that of an uninterrupted run bit for
            bit.

    Raises:
        SourceError: the images cannot be found, or there is too little memory for `data.cache` or `data.workers`.
        PlanError: too few images are large enough to train on, or the ranks cannot share the packs of a step evenly.
        RequestError: `folder` exists and `resume` is not set, or it cannot be created.
        ResumeError: the checkpoint is of another plan.
        RunError: too many images are unreadable, the loss is not finite, or the GPU's memory is too small.
        RankError: a rank is gone, has no GPU, or differs from the others.
        CheckpointError: a checkpoint cannot be written, or the newest one cannot be read or is of another architecture.
        OSError: the configuration, the log or an encoder cannot be written.
    """
    with ranks_of_run() as ranks:
        # Opened first, so that a wrong encoder or source leaves no folder behind.
        start = load_start(config, folder, resume)
        images = open_images(config, ranks, resume)
        if not resume and ranks.main:
            write_config(config, folder)
            start.keep(folder)
        run = Run(config, folder, images, start, ranks)
        state = TrainState(images.plan.hash, images.unreadable)
        if resume and not state.load(run.checkpoints, run.model, run.optimizer, ranks):
            logger.warning("%s has no checkpoint yet. Training starts from the first step.", folder)
        if resume:
            state.history.load_best(folder / "best", state.step)
        run.introduce(state)
        return run.loop(state)


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run and the plan of their packs."""

    source: Source
    catalog: Catalog
    unreadable: Unreadable
    plan: Plan
    first_epoch: EpochPlan


def open_images(config: TrainConfig, ranks: Ranks, resume: bool) -> TrainingImages:
    """Open the source, plan its packs, and check that they fit into memory; errors as for `train`."""
    source = open_source(config.data.source)
    with ranks.one_first():  # one rank scans the images, and the others read its catalog
        # One more readable image is another plan. So a resumed run keeps its images, and only rank 0 tries for more.
        catalog = open_catalog(source, retry=not resume and ranks.main)
    unreadable = Unreadable(catalog, config.data.max_unreadable)
    plan = Plan(catalog, config.data, config.encoder.patch_size, config.seed)
    own_packs = plan.share(ranks.world)
    first_epoch = plan.epoch(0)
    log_left_out(first_epoch, config)
    free = free_memory()
    ranks.wait()  # every rank measures before the first one allocates
    # A rank holds the packs of this step and of the last one. For a GPU they are pinned, which is not shared memory.
    held = 0 if ranks.device.type == "cuda" else 2 * own_packs
    check_shared_memory(
        config.data.workers,
        config.data.tokens_per_pack,
        config.encoder.patch_size,
        held,
        free.get(str(SHARED_MEMORY)),
        ranks.local_world_size,
    )
    if config.data.cache == "memory":
        source = InMemory(source, free, ranks.local_world_size)
        ranks.wait()  # one machine may read its images much faster than another
    return TrainingImages(source, catalog, unreadable, plan, first_epoch)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Create the run's folder and write its configuration.

    Raises:
        RequestError: the folder exists, or cannot be created.
    """
    make_folder(folder, new=True)
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


class Run:
    """The parts of a run that do not change from step to step.

    Args:
        config: of the run.
        folder: that it writes to.
        images: that it trains on.
        start: the encoders that it begins with.
        ranks: the processes that share it.
    """

    def __init__(self, config: TrainConfig, folder: Path, images: TrainingImages, start: Start, ranks: Ranks) -> None:
        self.config = config
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.first_step, self.advised = 0, False  # the first step of this process, and whether it gave advice on speed
        self.images = images
        self.ranks = ranks
        self.total = config.steps or max(1, round(config.epochs * len(images.first_epoch) / config.data.packs_per_step))
        torch.manual_seed(config.seed)  # every rank starts with the same weights
        # Recorded with the encoder: position embeddings beyond this grid stay untrained.
        longest_rows, longest_cols = images.first_epoch.grids.reshape(-1, 2).max(axis=0).tolist()
        preprocessing = start.preprocessing(config, (longest_rows, longest_cols))
        try:
            self.model = JEPA(
                start.architecture(config),
                config.predictor,
                config.objective,
                config.data.masked_views,
                preprocessing,
                start.teacher and start.teacher.to(ranks.device),
            ).to(ranks.device)
        except torch.OutOfMemoryError as error:
            raise RunError(
                "Student, teacher and predictor do not fit in GPU memory. Use a smaller encoder or teacher."
            ) from error
        if start.encoder is not None:
            self.model.start_from(start.encoder.network)
        self.optimizer = make_optimizer(self.model, config.optim.layer_decay)
        # What is trained: the moving average, or the student of a teacher that does not change.
        trained = self.model.student if self.model.frozen else self.model.teacher
        self.encoder = Encoder(trained, preprocessing, start.origin)
        self.autocast = autocast(ranks.device, autocast_dtype(config.precision, ranks.device))
        self.model.student.blocks.recompute = config.activation_checkpointing
        if config.compile:
            model = self.model
            for module in filter(None, (model.normalize, model.student, model.teacher, model.predictor)):
                module.compile(dynamic=True)

    @cached_property
    def dataset(self) -> PackDataset:
        """Return the dataset that makes the batch of a pack."""
        config, student, teacher = self.config, self.model.student.config, self.model.teacher.config
        return PackDataset(
            self.images.source,
            self.images.catalog,
            config.encoder.patch_size,
            config.masks,
            config.seed,
            teacher.depth,
            config.merging.teacher_rate,
            config.merging.student_rate,
            config.augment,
            teacher.prefix,
            student.depth,
            student.prefix,
        )

    def introduce(self, state: TrainState) -> None:
        """Log what the run trains on, and check that all ranks start from the same state.

        Raises:
            RankError: they do not.
        """
        if state.step == self.total:
            logger.warning("%s is finished: all %d steps are done.", self.folder, self.total)
            if self.ranks.main:  # the run may have stopped after its last checkpoint and before it wrote the encoder
                self.save_encoder("encoder", state)
        else:
            data = self.config.data
            logger.info(
                "Training: %s steps of %s tokens on %s images of %s, %.3g epochs%s.",
                f"{self.total:,}",
                f"{data.packs_per_step * data.tokens_per_pack:,}",
                f"{len(self.images.catalog.rows):,}",
                self.images.source.name,
                self.total * data.packs_per_step / len(self.images.first_epoch),
                f"; resuming after step {state.step:,}" if state.step else "",
            )
        self.ranks.agree(
            {"images, data settings or seed": state.plan, "checkpoint": state.step, "PyTorch": torch.__version__}
        )

    def loop(self, state: TrainState) -> Outcome:
        """Train from `state` to the last step, or until a signal asks to stop."""
        config, images, ranks, total = self.config, self.images, self.ranks, self.total
        monitor = start_monitor(
            config, images.source, images.plan, images.first_epoch, total, state.history, self.encoder.config
        )
        packs = images.plan.packs(state.cursor, ranks.rank, ranks.world)
        stream = iter(make_loader(self.dataset, packs, config.data.workers, pin_memory=ranks.device.type == "cuda"))
        own_packs = images.plan.share(ranks.world)
        grad_norm = torch.zeros(())
        with (
            RunLog(self.folder, state.step, state.log_bytes) if ranks.main else nullcontext() as log,
            ProgressBar(total, state.step) if ranks.main else nullcontext() as bar,
            StopSignals() as stop,
            explaining_memory(config.data),
        ):
            if monitor and not state.step:
                self.probe(state, monitor)  # a baseline for collapse, not in log.jsonl
            state.meter.restart_clock()
            self.first_step = state.step
            while state.step < total:
                with state.meter.waiting():
                    batches = [next(stream) for _ in range(own_packs)]
                # Every rank learns the size of the whole step, and all stop at the same step.
                shares = ranks.gather(Share.of(batches, stop.requested))
                if any(share.stop for share in shares):
                    logger.warning("Received a signal to stop. Saving the run.")
                    break
                grad_norm = self.step(state, batches, shares)
                due = monitor is not None and monitor.due(state.step)
                if state.step % config.log_every == 0 or state.step == total or due:
                    self.log_step(state, grad_norm, log, bar, monitor if due else None)
                if state.step % config.checkpoint_every == 0 or state.step == total:
                    self.save(state, grad_norm, log)
            # Not at step 0: the optimizer has no state yet, and to save it PyTorch would run a step.
            if 0 < state.step < total:
                self.save(state, grad_norm, log)
        if state.history.best_step == 0 and state.step == total:
            logger.warning(
                "The encoder that this run started from scored better than every later one. It is in %s. Use it, or "
                "start a new run with a lower --optim.lr or more images.",
                self.folder / "best",
            )
        return Outcome(state.step, state.images, finished=state.step == total)

    def step(self, state: TrainState, batches: Sequence[Batch], shares: Sequence[Share]) -> Tensor:
        """Train on this rank's packs of a step, and return the norm of the gradients.

        Args:
            state: of the run. It advances by what all ranks trained on.
            batches: this rank's packs.
            shares: what each rank has in this step.
        """
        for share in shares:
            state.unreadable.add(share.unreadable)
        size = StepSize(sum(share.target_tokens for share in shares), self.config.data.packs_per_step)
        settings = step_settings(self.config.optim, state.step, self.total)
        filled = with_images(batches)
        losses, grad_norm = train_step(
            self.model, self.optimizer, filled, size, settings, self.config.optim.clip, self.autocast, self.ranks
        )
        views = sum(share.views for share in shares)
        if views:  # a step in which no rank could read an image has no loss
            state.meter.add_step(losses, filled)
        state.advance(views // self.config.data.masked_views, [share.last for share in shares])
        return grad_norm

    def log_step(
        self,
        state: TrainState,
        grad_norm: Tensor,
        log: RunLog | None,
        bar: ProgressBar | None,
        monitor: Monitor | None,
    ) -> None:
        """Write a line of the log, and probe the teacher if a `monitor` is given.

        Raises:
            RunError: the loss or the gradients are not finite.
        """
        means = state.meter.read(self.config.data.tokens_per_pack, self.ranks)
        if not means and not monitor:
            return  # no image could be read since the last line
        settings = step_settings(self.config.optim, state.step - 1, self.total)  # of the step that was just made
        values = means | {"lr": settings.lr, "weight_decay": settings.weight_decay, "ema": settings.ema}
        values |= {"grad_norm": grad_norm.item(), "epoch": state.epoch, "unreadable": len(state.unreadable)}
        if not (math.isfinite(means.get("loss", 0.0)) and math.isfinite(values["grad_norm"])):
            raise diverged(state.step)
        if bar and means:
            bar.update(state.step, describe(means))
            settled = state.step - self.first_step >= SETTLED
            if settled and not self.advised and means["data_wait"] > MOST_WAITING:
                logger.warning("%s", advice(means["data_wait"], self.config.data))
                self.advised = True
        if monitor:
            values |= self.probe(state, monitor)
            state.meter.restart_clock()  # the time of the probe is not training time
        if log:
            log.write(state.step, values)

    def probe(self, state: TrainState, monitor: Monitor) -> dict[str, float]:
        """Probe the encoder, save it if it is the best so far, and return what to log."""
        values = monitor.probe(state.step, self.encoder, self.autocast, self.ranks)
        if self.ranks.main and state.history.best_step == state.step:
            self.save_encoder("best", state)
            state.history.save_best(self.folder / "best")
        return values

    def save(self, state: TrainState, grad_norm: Tensor, log: RunLog | None) -> None:
        """Write a checkpoint and the encoder.

        Raises:
            RunError: no image could be read yet, or the last gradients are not finite, so the weights are not either.
            CheckpointError: see `TrainState.save`.
        """
        if not state.images:
            raise RunError(
                f"None of the images of {self.images.source.name} could be read in {state.step} steps, so nothing was "
                "trained. The reasons are in the lines above."
            )
        if not grad_norm.isfinite():
            raise diverged(state.step)
        facts = {"config": dataclasses.asdict(self.config), "log_bytes": log.sync() if log else 0}
        state.save(self.checkpoints, self.model, self.optimizer, self.ranks, facts)
        if self.ranks.main:
            self.save_encoder("encoder", state)

    def save_encoder(self, name: str, state: TrainState) -> None:
        """Write the teacher into the folder `name` of the run. Only rank 0 calls this."""
        remove_partials(self.folder / name)
        facts = training_facts(self.config, len(self.images.catalog.rows), state.step, state.images)
        self.encoder.record = Record(training=facts)
        self.encoder.save_pretrained(self.folder / name)


class Share(NamedTuple):
    """A summary of one rank's packs of a step, for the other ranks."""

    stop: bool
    """Whether a signal has asked this rank to stop."""
    target_tokens: int
    views: int
    """Masked views."""
    unreadable: list[tuple[int, str]]
    """Row and reason of each image that could not be decoded."""
    last: tuple[int, int]
    """Epoch and number of the rank's last pack."""

    @classmethod
    def of(cls, batches: Sequence[Batch], stop: bool) -> Self:
        """Return the share of a rank with these batches."""
        filled = with_images(batches)
        return cls(
            stop,
            sum(len(batch.targets.index) for batch in filled),
            sum(len(batch.image_ids) for batch in filled),
            [image for batch in batches for image in batch.unreadable],
            batches[-1].cursor,
        )


def with_images(batches: Sequence[Batch]) -> list[MaskedBatch]:
    """Return the batches with at least one readable image."""
    return [batch for batch in batches if isinstance(batch, MaskedBatch) and len(batch.image_ids)]


@contextmanager
def explaining_memory(config: DataConfig) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into advice on what to set.

    Raises:
        RunError: the GPU's memory is too small for a pack.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        half, twice = config.tokens_per_pack // 2, 2 * config.packs_per_step
        try:  # whether half the budget is a valid configuration
            dataclasses.replace(config, tokens_per_pack=half, max_view_tokens=config.view_limit)
            advice = (
                f"Start a new run with --data.tokens_per_pack {half} --data.packs_per_step {twice} "
                f"--data.max_view_tokens {config.view_limit}: packs of half the size, with the same number of tokens "
                "per step."
            )
        except ValueError:
            advice = "Start a new run with a smaller encoder, or with smaller or fewer views."
        raise RunError(f"Packs of {config.tokens_per_pack} tokens do not fit in GPU memory. {advice}") from error


def diverged(step: int) -> RunError:
    """Return the error of a loss or a gradient that is not finite."""
    return RunError(
        f"The loss or its gradient is NaN or infinite at step {step}. Start a new run with a lower --optim.lr or a "
        "higher --optim.warmup."
    )


def log_left_out(plan: EpochPlan, config: TrainConfig) -> None:
    """Log how many images are too small to train on, and how many views are scaled down."""
    if plan.too_small:
        logger.warning(
            "Skipped %d images that are too small (views with fewer than %d patches).",
            plan.too_small,
            MIN_TOKENS,
        )
    if plan.limited:
        logger.warning(
            "%d views per epoch exceed data.max_view_tokens and are scaled down to %d tokens.",
            plan.limited,
            config.data.view_limit,
        )
