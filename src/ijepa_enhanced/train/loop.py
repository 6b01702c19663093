"""The training loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.catalog import LISTED, Catalog, open_catalog, report_unreadable
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.in_memory import SHARED_MEMORY, InMemory, free_memory
from ijepa_enhanced.data.loader import PackDataset, check_shared_memory, make_loader
from ijepa_enhanced.data.plan import Cursor, EpochPlan, Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype
from ijepa_enhanced.distributed import Ranks, ranks_of_run
from ijepa_enhanced.encoder import Encoder, Preprocessing
from ijepa_enhanced.errors import ResumeError, RunError
from ijepa_enhanced.files import replacing
from ijepa_enhanced.jepa import JEPA, Losses, StepSize
from ijepa_enhanced.masks import MIN_TOKENS
from ijepa_enhanced.train.checkpoint import latest_checkpoint, load_checkpoint, read_progress, save_checkpoint
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import ProgressBar, RunLog
from ijepa_enhanced.train.monitor import History, start_watch
from ijepa_enhanced.train.optimizer import make_optimizer, set_step, step_settings

logger = logging.getLogger(__name__)

PARTS = ("prediction", "vicreg", "contrastive")
"""Of the loss, as they are logged: before their weights."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int
    """Steps done since the run began."""
    images: int
    """Images shown since the run began, with repetition."""
    finished: bool
    """False when a signal stopped it; it can be resumed."""


def train(config: TrainConfig, folder: Path, resume: bool = False) -> Outcome:
    """Train, write logs, checkpoints and the encoder into `folder`, and return how it ended.

    The encoder in `folder/encoder` is the last teacher, that in `folder/best` the one that the watch found best so far.

    With `resume` it goes on from the newest checkpoint in `folder`, or from the start where there is none. On the CPU
    what follows is bit for bit what would have followed had the run not stopped, at the same thread count and versions.

    Started by `torchrun`, the ranks share the packs of every step; the main one writes.

    Raises:
        SourceError: the images cannot be found, or there is too little memory for `data.cache` or `data.workers`.
        PlanError: too few images are large enough to train on, or the ranks cannot share the packs of a step evenly.
        FileExistsError: without `resume`, `folder` is already there.
        ResumeError: the checkpoint is of another plan or architecture.
        RunError: too many images are unreadable, the loss is not finite, or the GPU's memory is too small.
        RankError: a rank is gone, has no GPU, or is not about to do the same as the others.
        CheckpointError: a checkpoint could not be written.
    """
    with ranks_of_run() as ranks:
        return _train(config, folder, resume, ranks)


def _train(config: TrainConfig, folder: Path, resume: bool, ranks: Ranks) -> Outcome:
    device = ranks.device
    source = open_source(config.data.source)
    with ranks.one_first():
        catalog = open_catalog(source)
    unreadable = Unreadable(catalog, config.data.max_unreadable)
    plan = Plan(catalog, config.data, config.encoder.patch_size, config.seed)
    packs, own_packs = config.data.packs_per_step, plan.share(ranks.world)
    first_epoch = plan.epoch(0)
    say_what_is_left_out(first_epoch, config)
    free = free_memory()
    ranks.gather(None)  # all have looked before one of them takes its part
    # The packs of this step and of the last; for a GPU they are pinned, which is elsewhere.
    held = 0 if device.type == "cuda" else 2 * own_packs
    check_shared_memory(
        config.data.workers,
        config.data.tokens_per_pack,
        config.encoder.patch_size,
        held,
        free.get(str(SHARED_MEMORY)),
        ranks.on_machine,
    )
    if config.data.cache == "memory":
        source = InMemory(source, free, ranks.on_machine)
    total = config.steps or max(1, round(config.epochs * len(first_epoch) / packs))

    if not resume and ranks.main:
        folder.mkdir(parents=True)
        with replacing(folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    torch.manual_seed(config.seed)
    model = JEPA(config.encoder, config.predictor, config.objective, config.data.masked_views).to(device)
    optimizer = make_optimizer(model)
    encoder = Encoder(model.teacher, Preprocessing(resolution=config.data.max_resolution))
    learned = [value for value in model.parameters() if value.requires_grad]
    done, images_shown, log_bytes, cursor = 0, 0, 0, Cursor(0, 0)
    meter, seen = Meter(), History()
    grad_norm = torch.zeros(())
    checkpoints = folder / "checkpoints"
    if resume and (checkpoint := latest_checkpoint(checkpoints)):
        progress = read_progress(checkpoint)
        if progress["plan"] != plan.hash:
            raise ResumeError(f"{folder} was trained on other images or with another plan; start a new run instead.")
        load_checkpoint(checkpoint, model, optimizer)
        done, images_shown, log_bytes = progress["step"], progress["images"], progress["log_bytes"]
        cursor = Cursor(*progress["cursor"])
        meter.restore(progress["meter"], ranks)
        seen = History(**progress["watch"])
        unreadable.found |= {int(row): reason for row, reason in progress["unreadable"].items()}
    elif resume:
        logger.warning("%s has no checkpoint yet: it begins anew.", folder)
    if done == total:
        logger.warning("%s is finished: all %d steps are done.", folder, total)
        if ranks.main:  # it may have been stopped between the checkpoint and this
            encoder.save_pretrained(folder / "encoder")
    else:
        logger.info(
            "Training: %s steps of %s tokens on %s images of %s, %.3g epochs%s.",
            f"{total:,}",
            f"{packs * config.data.tokens_per_pack:,}",
            f"{len(catalog.rows):,}",
            source.name,
            total * packs / len(first_epoch),
            f"; going on after step {done:,}" if done else "",
        )
    ranks.agree({"plan": plan.hash, "checkpoint": done, "PyTorch": torch.__version__})
    watch = start_watch(
        config.monitor,
        source,
        plan,
        first_epoch,
        config.encoder,
        config.merging.teacher_rate,
        total,
        config.log_every,
        seen,
    )
    model.student.blocks.recompute = config.activation_checkpointing
    if config.compile:
        for network in filter(None, (model.student, model.teacher, model.predictor)):
            network.compile(dynamic=True)
    products = autocast(device, autocast_dtype(config.precision, device))

    dataset = PackDataset(
        source,
        catalog,
        config.encoder.patch_size,
        config.masks,
        config.seed,
        config.encoder.shape.depth,
        config.merging.teacher_rate,
        config.merging.student_rate,
        config.augment,
    )
    loader = make_loader(
        dataset, plan.packs(cursor, ranks.rank, ranks.world), config.data.workers, pin_memory=device.type == "cuda"
    )
    stream = iter(loader)
    with (
        RunLog(folder, done, log_bytes) if ranks.main else nullcontext() as log,
        ProgressBar(total, done) if ranks.main else nullcontext() as bar,
        StopSignals() as stop,
        explaining_memory(config.data),
    ):

        def save() -> None:
            if not grad_norm.isfinite():  # nor are the weights, then, which would be all that is left to go on from
                raise diverged(done)
            states = ranks.gather(meter.state())
            if log is None:
                return
            progress = {
                "step": done,
                "images": images_shown,
                "cursor": cursor,
                "plan": plan.hash,
                "config": dataclasses.asdict(config),
                "log_bytes": log.sync(),
                "meter": Meter.merged(states),
                "watch": dataclasses.asdict(seen),
                "unreadable": unreadable.found,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            save_checkpoint(checkpoints, done, model, optimizer, progress)
            encoder.save_pretrained(folder / "encoder")

        if watch and ranks.main and not done:
            watch.look(0, encoder, products)  # for comparison; there is no line of the log yet
        meter.restart_clock()
        while done < total:
            with meter.waiting():
                batches = [next(stream) for _ in range(own_packs)]
            shown = [batch for batch in batches if isinstance(batch, MaskedBatch) and len(batch.image_ids)]
            shares = ranks.gather(Share.of(batches, shown, stop.requested))
            if any(share.stop for share in shares):
                break
            for share in shares:
                unreadable.add(share.unreadable)
            step_target_tokens = sum(share.target_tokens for share in shares)

            settings = step_settings(config.optim, done, total)
            set_step(optimizer, settings)
            for batch in shown:
                with products:
                    shown_batch = model.preprocess(batch.to(device, non_blocking=True))
                    targets = model.targets(shown_batch)
                    features = model.features(shown_batch)
                    predicted = model.predict(features, shown_batch)
                    losses = model.losses(
                        predicted, targets, features, shown_batch, StepSize(step_target_tokens, packs)
                    )
                if losses.total.requires_grad:
                    losses.total.backward()
                meter.add(losses, batch)
            ranks.sum_gradients(learned)
            grad_norm = nn.utils.clip_grad_norm_(learned, config.optim.clip)
            optimizer.step()
            optimizer.zero_grad()
            model.update_teacher(settings.ema)

            done += 1
            meter.steps += 1
            images_shown += sum(share.views for share in shares) // config.data.masked_views
            epoch, pack = max(share.last for share in shares)
            cursor = Cursor(epoch, pack + 1)
            looking = watch is not None and watch.due(done)
            if done % config.log_every == 0 or done == total or looking:
                values = meter.read(config.data.tokens_per_pack, ranks) | settings._asdict()
                values |= {"grad_norm": grad_norm.item(), "epoch": epoch, "unreadable": len(unreadable)}
                if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                    raise diverged(done)
                if bar:
                    bar.update(done, describe(values))
                if watch and looking:
                    if ranks.main:
                        values |= watch.look(done, encoder, products)
                        if seen.best_step == done:
                            encoder.save_pretrained(folder / "best")
                    meter.restart_clock()
                if log:
                    log.write(done, values)
            if done % config.checkpoint_every == 0 or done == total:
                save()
        # Not of an optimizer that has done nothing: asked for its state, PyTorch makes a step to have one.
        if 0 < done < total:
            save()
    return Outcome(done, images_shown, finished=done == total)


class Share(NamedTuple):
    """What the others must know of a rank's packs of a step."""

    stop: bool
    """A signal asked to stop before this step."""
    target_tokens: int
    views: int
    unreadable: list[tuple[int, str]]
    last: tuple[int, int]
    """Epoch and number of its last pack."""

    @classmethod
    def of(cls, batches: Sequence[Batch], shown: Sequence[MaskedBatch], stop: bool) -> Self:
        """Of a rank's batches, and of those among them that hold images."""
        return cls(
            stop,
            sum(len(batch.targets.index) for batch in shown),
            sum(len(batch.image_ids) for batch in shown),
            [image for batch in batches for image in batch.unreadable],
            batches[-1].cursor,
        )


@contextmanager
def explaining_memory(config: DataConfig) -> Iterator[None]:
    """Say what to set where the GPU's memory is too small for a pack.

    Raises:
        RunError: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        half, twice = config.tokens_per_pack // 2, 2 * config.packs_per_step
        try:
            dataclasses.replace(config, tokens_per_pack=half, max_view_tokens=config.view_limit)
            advice = (
                f"set data.tokens_per_pack to {half}, data.packs_per_step to {twice} and data.max_view_tokens to "
                f"{config.view_limit}: half as much at once, and as much in a step"
            )
        except ValueError:
            advice = "take a smaller encoder, or smaller or fewer views"
        raise RunError(
            f"The GPU's memory does not hold what a pack of {config.tokens_per_pack} tokens needs. "
            f"In a new run, {advice}."
        ) from error


def diverged(step: int) -> RunError:
    """What to say of a loss that is no number."""
    return RunError(f"The loss is not finite at step {step}: lower optim.lr or raise optim.warmup.")


def say_what_is_left_out(plan: EpochPlan, config: TrainConfig) -> None:
    """Log how many images are too small to train on, and how many views are scaled down."""
    if plan.too_small:
        logger.warning(
            "Too small to train on, with views of fewer than %d patches: %d images.", MIN_TOKENS, plan.too_small
        )
    if plan.limited:
        logger.warning(
            "Scaled down to the limit of %d tokens a view (data.max_view_tokens): %d views of an epoch.",
            config.data.view_limit,
            plan.limited,
        )


class Unreadable:
    """The distinct images of a source that cannot be read, and how many of them a run puts up with."""

    def __init__(self, catalog: Catalog, limit: float) -> None:
        self.headers = dict(catalog.unreadable)
        self.found: dict[int, str] = {}
        self.catalog = catalog
        self.limit = limit
        self.images = len(catalog.rows) + len(self.headers)
        self._check()
        report_unreadable(catalog)

    def __len__(self) -> int:
        return len(self.headers) + len(self.found)

    def add(self, unreadable: Iterable[tuple[int, str]]) -> None:
        """Count images that could not be decoded: row and reason of each.

        Raises:
            RunError: there are now more than the limit.
        """
        for row, reason in unreadable:
            if row not in self.found:
                self.found[row] = reason
                logger.warning("Left out: %s: %s", self._key(row), reason)
                self._check()

    def _key(self, row: int) -> str:
        return self.catalog.key(int(np.searchsorted(self.catalog.rows, row)))

    def _check(self) -> None:
        reasons = self.headers | {self._key(row): reason for row, reason in self.found.items()}
        if len(reasons) > self.limit * self.images:
            listed = "\n".join(f"  {key}: {reason}" for key, reason in list(reasons.items())[:LISTED])
            more = f"\n  and {len(reasons) - LISTED} more" if len(reasons) > LISTED else ""
            raise RunError(
                f"{len(reasons)} of {self.images} images cannot be read, more than data.max_unreadable "
                f"({self.limit:.2%}) allows:\n{listed}{more}\nTake them away, or raise data.max_unreadable."
            )


class Meter:
    """Losses and rates since the last reading; nothing is read from the device before that, or before a checkpoint."""

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[Tensor] = []
        self.tokens: list[int] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin anew with the rates, not with the losses."""
        self.start = time.perf_counter()
        self.waited = 0.0
        self.views = 0
        self.earlier = len(self.tokens)

    def state(self) -> dict[str, Any]:
        """What a checkpoint between two readings keeps, so that the next reading is the same after resuming."""
        losses = [losses.tolist() for losses in self.losses]
        return {"steps": self.steps, "losses": losses, "tokens": self.tokens}

    @staticmethod
    def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The states of all ranks as one."""
        joint = {name: [one for state in states for one in state[name]] for name in ("losses", "tokens")}
        return {"steps": states[0]["steps"], **joint}

    def restore(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Go on from a `state` of all ranks, which the main one takes over."""
        self.steps = state["steps"]
        if ranks.main:
            self.losses = [torch.tensor(losses) for losses in state["losses"]]
            self.tokens = state["tokens"]
        self.restart_clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is time spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, losses: Losses, batch: MaskedBatch) -> None:
        """Count one pack."""
        self.losses.append(torch.stack([losses.total.detach(), *(getattr(losses, name) for name in PARTS)]))
        self.tokens.append(batch.tokens)
        self.views += len(batch.seen)

    def read(self, tokens_per_pack: int, ranks: Ranks) -> dict[str, float]:
        """Means over the steps since the last reading, of all ranks together, and begin anew.

        Raises:
            RunError: there was nothing to train on.
        """
        names = ("loss", *PARTS)
        total = torch.zeros(len(names))
        if self.losses:
            total = torch.stack([losses.to(self.losses[-1].device) for losses in self.losses]).sum(dim=0).cpu()
        seconds = time.perf_counter() - self.start  # now that the device is done with these steps
        shown = [self.views, sum(self.tokens[self.earlier :]), sum(self.tokens), len(self.tokens)]
        *parts, views, new_tokens, tokens, packs = ranks.sums([*total.tolist(), *shown])
        if not packs:
            raise RunError(f"No image of the last {self.steps} steps could be read.")
        values = {
            **{name: part / self.steps for name, part in zip(names, parts, strict=True)},
            "views_per_second": views / seconds,
            "tokens_per_second": new_tokens / seconds,
            "fill": tokens / (packs * tokens_per_pack),
            "data_wait": self.waited / seconds,
        }
        self.steps, self.losses, self.tokens = 0, [], []
        self.restart_clock()
        return values


def describe(values: dict[str, float]) -> str:
    """One line for the progress bar."""
    return (
        f"loss {values['loss']:.4f}  {values['views_per_second']:.0f} views/s  "
        f"{values['tokens_per_second']:.0f} tokens/s  packs {values['fill']:.1%} full  "
        f"waiting for data {values['data_wait']:.1%}"
    )


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `requested`; a second one acts as it would have without this."""

    def __enter__(self) -> Self:
        self.requested = False
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        logger.warning("%s: finishing this step, then saving.", signal.Signals(number).name)
        signal.signal(number, self.before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
