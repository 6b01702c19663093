"""The training loop: restore a checkpoint, train, log, save."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
import yaml

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.data.loader import PackDataset, make_loader
from ijepa_enhanced.data.sources.open import anchored
from ijepa_enhanced.devices import autocast, autocast_dtype, pins_memory, training_workers
from ijepa_enhanced.distributed import Ranks, is_one_of_many, ranks_of_run
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.files import make_folder, remove_partials, replacing
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.models.preprocessing import Record
from ijepa_enhanced.train.agreement import check_shared, facts_of, together
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.faults import (
    MOST_SKIPPED,
    WORKER_TIMEOUT,
    check_weights,
    explaining_memory,
    explaining_workers,
    record_skipped,
    too_many_skipped,
)
from ijepa_enhanced.train.images import TrainingImages, open_images
from ijepa_enhanced.train.logging import ProgressBar, RunLog
from ijepa_enhanced.train.meter import MOST_WAITING, SETTLED, advice, describe
from ijepa_enhanced.train.monitor import Monitor, start_monitor
from ijepa_enhanced.train.optimizer import make_optimizer, step_settings
from ijepa_enhanced.train.parallel import parallelize, whole
from ijepa_enhanced.train.record import training_facts
from ijepa_enhanced.train.saved import keep_launch, resumes
from ijepa_enhanced.train.share import Share
from ijepa_enhanced.train.signals import StopSignals
from ijepa_enhanced.train.start import Start, load_start
from ijepa_enhanced.train.state import TrainState
from ijepa_enhanced.train.step import StepResult, train_step

logger = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds between the SIGTERM and the SIGKILL of torchrun. `--shutdown_timeout` of PyTorch 2.13 can raise them."""


@dataclass(frozen=True)
class Outcome:
    """The result of `train`."""

    steps: int
    """Steps done since the start of the run."""
    images: int
    """Images shown since the start of the run, counted each time."""
    finished: bool
    """False if a signal stopped the run, which can then be resumed."""


def train(config: TrainConfig, folder: Path, resume: bool = False, initial: Encoder | None = None) -> Outcome:
    """Train, and write logs, checkpoints and encoders into `folder`.

    `folder/encoder` is the last teacher, and `folder/best` the best teacher so far by the monitor. Under `torchrun`,
    the ranks share the packs of every step, and rank 0 writes.

    Args:
        config: of the run.
        folder: of the run.
        resume: continue from the newest checkpoint in `folder`, or from the start if there is none. On the CPU, with
            the same number of threads and the same versions, the result equals that of an uninterrupted run bit for
            bit.
        initial: the encoder of `config.init`, if it is loaded already.

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
        resume = resumes(config, folder, resume, ranks)
        ranks.agree(facts_of(config, resume))
        # Opened first, so that a wrong encoder or source leaves no folder behind.
        start = load_start(config, folder, resume, initial)
        images = open_images(config, ranks, resume)
        start = start.measured(images.catalog, config, ranks)
        ranks.agree({"images": images.plan.hash})
        if not resume and ranks.main:
            write_config(config, folder)
            keep_launch(folder)
            start.keep(folder)
        check_shared(folder, ranks)
        run = Run(config, folder, images, start, ranks)
        state = TrainState(images.plan.hash, images.unreadable)
        if resume and not state.load(run.checkpoints, run.model, run.optimizer, ranks):
            logger.warning("%s has no checkpoint yet. Training starts from the first step.", folder)
        if resume:
            state.history.load_best(folder / "best", state.step)
        run.introduce(state)
        return run.loop(state)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Create the run's folder and write its configuration, with absolute paths of the images.

    Raises:
        RequestError: the folder cannot be created.
    """
    make_folder(folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=anchored(config.data.source)))
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
        epoch = images.plan.outline
        self.total = config.steps or max(1, round(config.epochs * epoch.packs / config.data.packs_per_step))
        torch.manual_seed(config.seed)
        # Recorded with the encoder: position embeddings beyond this grid stay untrained.
        preprocessing = start.preprocessing(config, epoch.longest)
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
        self.network = parallelize(self.model, config.parallel, ranks)
        self.optimizer = make_optimizer(self.model)
        self.unsettled: tuple[Sequence[MaskedBatch], StepResult] | None = None
        """The last step, until the device has finished it."""
        # What is trained: the moving average, or the student of a teacher that does not change.
        trained = self.model.student if self.model.frozen else self.model.teacher
        self.encoder = Encoder(trained, preprocessing, start.origin)
        self.teacher_license = start.teacher_license
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
            config.data.channels,
        )

    def introduce(self, state: TrainState) -> None:
        """Log what the run trains on, and check that all ranks start from the same state.

        Raises:
            RankError: they do not.
        """
        if state.step == self.total:
            logger.warning("%s is finished: all %d steps are done.", self.folder, self.total)
            # The run may have stopped after its last checkpoint and before it wrote the encoder.
            self.save_encoder(whole(self.encoder), "encoder", state)
        else:
            data = self.config.data
            logger.info(
                "Training: %s steps of %s tokens on %s images of %s, %.3g epochs%s.",
                f"{self.total:,}",
                f"{data.packs_per_step * data.tokens_per_pack:,}",
                f"{len(self.images.catalog.rows):,}",
                self.images.source.name,
                self.total * data.packs_per_step / self.images.plan.outline.packs,
                f"; resuming after step {state.step:,}" if state.step else "",
            )
        self.ranks.agree({"checkpoint": state.step})

    def loop(self, state: TrainState) -> Outcome:
        """Train from `state` to the last step, or until a signal asks to stop."""
        config, images, ranks, total = self.config, self.images, self.ranks, self.total
        monitor = start_monitor(config, images.source, images.plan, total, state.history, self.encoder.config)
        packs = images.plan.packs(state.cursor, ranks.rank, ranks.world)
        pinned, workers = pins_memory(ranks.device), training_workers(config.data.workers, ranks.device)
        stream = iter(make_loader(self.dataset, packs, workers, pinned, WORKER_TIMEOUT))
        own_packs = images.plan.share(ranks.world)
        with (
            RunLog(self.folder, state.step, state.log_bytes) if ranks.main else nullcontext() as log,
            ProgressBar(total, state.step) if ranks.main else nullcontext() as bar,
            StopSignals(ranks.main) as stop,
            explaining_memory(config.data),
            explaining_workers(),
        ):
            if monitor and not state.step:
                self.probe(state, monitor)  # a baseline for collapse, not in log.jsonl
            state.meter.restart_clock()
            self.first_step = state.step
            while state.step < total:
                with together(state.step + 1, ranks):
                    with state.meter.waiting():
                        batches = [cast(MaskedBatch, next(stream)) for _ in range(own_packs)]
                    # Every rank learns the size of the whole step, and all stop at the same step.
                    share = Share.of_all(batches, stop.requested, ranks)
                    if share.stop:
                        logger.warning("Received a signal to stop. Saving the run.")
                        break
                    self.step(state, batches, share)
                    if state.step == self.first_step + 1:
                        ranks.expect_steps()
                    self.after_step(state, log, bar, monitor)
            self.settle(state)
            # Not at step 0: the optimizer has no state yet, and to save it PyTorch would run a step.
            if 0 < state.step < total:
                self.save(state, log)
        if state.history.best_step == 0 and state.step == total:
            logger.warning(
                "The encoder that this run started from scored better than every later one. It is in %s. Use it, or "
                "start a new run with a lower --optim.lr or more images.",
                self.folder / "best",
            )
        return Outcome(state.step, state.images, finished=state.step == total)

    def step(self, state: TrainState, batches: Sequence[MaskedBatch], share: Share) -> None:
        """Train on this rank's packs of a step.

        Args:
            state: of the run. It advances by what all ranks trained on.
            batches: this rank's packs.
            share: counts of this step over all ranks.
        """
        if share.unreadable:
            for found in self.ranks.gather([image for batch in batches for image in batch.unreadable]):
                state.unreadable.add(found)
        result = None
        if share.views:  # a step in which no rank could read an image changes nothing
            size = StepSize(share.target_tokens, self.config.data.packs_per_step)
            settings = step_settings(self.config.optim, state.step, self.total)
            result = train_step(
                self.model,
                self.network,
                self.optimizer,
                batches,
                size,
                settings,
                self.config.optim.clip,
                self.autocast,
                self.ranks.device,
            )
        # Check the previous step only now, so that the device computes this step while the host waits.
        self.settle(state)
        state.advance(share.views // self.config.data.masked_views, share.next)
        self.unsettled = result and (batches, result)

    def settle(self, state: TrainState) -> None:
        """Wait until the device has finished the last step, and count the step as done or as skipped.

        Raises:
            RunError: too many steps in a row were skipped, or weights are not finite.
        """
        if self.unsettled is None:
            return
        (batches, result), self.unsettled = self.unsettled, None
        if result.grad_norm.read().isfinite():
            state.trained(batches, result)
            return
        state.skipped += 1
        state.skipped_in_row += 1
        record_skipped(self.folder, state.step, batches, result.losses, state.unreadable, self.ranks)
        check_weights(self.model, state.step, self.ranks)
        if state.skipped_in_row >= min(MOST_SKIPPED, self.total / 2):
            raise too_many_skipped(self.folder, state.step, state.skipped_in_row)

    def after_step(
        self, state: TrainState, log: RunLog | None, bar: ProgressBar | None, monitor: Monitor | None
    ) -> None:
        """Write a line of the log, probe the teacher, and save, each if it is due."""
        config, last = self.config, state.step == self.total
        probes = monitor is not None and monitor.due(state.step)
        logs = state.step % config.log_every == 0 or last or probes
        saves = state.step % config.checkpoint_every == 0 or last
        if logs or saves:
            self.settle(state)
        if logs:
            self.log_step(state, log, bar, monitor if probes else None)
        # Skipped steps may be caused by the weights, so keep the earlier checkpoints.
        if saves and (last or not state.skipped_in_row):
            self.save(state, log)

    def log_step(self, state: TrainState, log: RunLog | None, bar: ProgressBar | None, monitor: Monitor | None) -> None:
        """Write a line of the log, and probe the teacher if a `monitor` is given."""
        means = state.meter.read(self.config.data.tokens_per_pack, self.ranks)
        if not means and not monitor:
            return  # no image could be read since the last line, or all steps were skipped
        settings = step_settings(self.config.optim, state.step - 1, self.total)  # of the step that was just made
        values = means | {"lr": settings.lr, "weight_decay": settings.weight_decay, "ema": settings.ema}
        values |= {"grad_norm": state.grad_norm, "epoch": state.epoch, "unreadable": len(state.unreadable)}
        values |= {"skipped": state.skipped}
        if bar and means:
            bar.update(state.step, describe(means))
            settled = state.step - self.first_step >= SETTLED
            if settled and not self.advised and means["data_wait"] > MOST_WAITING:
                logger.warning("%s", advice(means["data_wait"], self.config.data, self.ranks.device))
                self.advised = True
        if monitor:
            values |= self.probe(state, monitor)
            state.meter.restart_clock()  # the time of the probe is not training time
        if log:
            log.write(state.step, values)

    def probe(self, state: TrainState, monitor: Monitor) -> dict[str, float]:
        """Probe the encoder, save it if it is the best so far, and return what to log."""
        encoder = whole(self.encoder)
        values = monitor.probe(state.step, encoder, self.autocast, self.ranks)
        if self.ranks.main and state.history.best_step == state.step:
            self.save_encoder(encoder, "best", state)
            state.history.save_best(self.folder / "best")
        self.ranks.wait()  # rank 0 scores alone
        return values

    def save(self, state: TrainState, log: RunLog | None) -> None:
        """Write a checkpoint and the encoder.

        Raises:
            RunError: no image could be read yet.
            CheckpointError: see `TrainState.save`.
        """
        if not state.images:
            raise RunError(
                f"None of the images of {self.images.source.name} could be read in {state.step} steps, so nothing was "
                "trained. The reasons are in the lines above."
            )
        start = time.perf_counter()
        facts = {"config": dataclasses.asdict(self.config), "log_bytes": log.sync() if log else 0}
        state.save(self.checkpoints, self.model, self.optimizer, self.ranks, facts)
        self.save_encoder(whole(self.encoder), "encoder", state)
        self.ranks.wait()
        seconds = time.perf_counter() - start
        if seconds > GRACE and is_one_of_many():
            logger.warning(
                "Saving took %.0f s. torchrun kills processes %.0f s after it asks them to stop, so a stopped run may "
                "lose the steps since its last checkpoint. Lower checkpoint_every to lose fewer.",
                seconds,
                GRACE,
            )

    def save_encoder(self, encoder: Encoder, name: str, state: TrainState) -> None:
        """Write the encoder, with whole weights, into the folder `name` of the run. Rank 0 writes."""
        if self.ranks.main:
            remove_partials(self.folder / name)
            images = len(self.images.catalog.rows)
            facts = training_facts(self.config, images, state.step, state.images, self.teacher_license)
            encoder.record = Record(training=facts)
            encoder.save_pretrained(self.folder / name)
