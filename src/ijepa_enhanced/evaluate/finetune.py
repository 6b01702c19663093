"""Classification by an encoder that continues to learn, with labels: what its weights are worth as a start."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.config import AugmentConfig, DataConfig
from ijepa_enhanced.data.loader import PackDataset, make_loader
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.devices import HostCopy, autocast, pins_memory
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import NotFiniteError
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.evaluate.scores import classification
from ijepa_enhanced.evaluate.tokens import (
    Counting,
    InferenceConfig,
    LabelledSource,
    need_images,
    packs_of,
    reduced_packs,
    uncounted,
    warn_of_unreadable,
)
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.packed import Packed, segment_ids
from ijepa_enhanced.randomness import Purpose, generator
from ijepa_enhanced.schedules import warmup_cosine

logger = logging.getLogger(__name__)


class Classifier(nn.Module):
    """An encoder and a linear layer on the mean of its tokens.

    Args:
        encoder: which is copied.
        classes: C.
        drop_path: see `FinetuneConfig`.
        seed: of what is dropped.
    """

    def __init__(self, encoder: Encoder, classes: int, drop_path: float, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        device = encoder.device
        self.to(device)
        self.random = torch.Generator(device).manual_seed(seed)
        self.cu_seqlens: list[Tensor] = []
        """Of the stream before each layer and after the last, for the pack that is being seen."""
        layers = list(self.encoder.network.blocks.layers)
        for number, layer in enumerate(layers):
            chance = drop_path * (number + 1) / len(layers)
            # Only the second half of a block comes after its merging.
            for name, stream in (("proj", number), ("fc2", number + 1)):
                layer.get_submodule(name).register_forward_hook(partial(self._skip, chance, stream))

    def _skip(self, chance: float, stream: int, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if not self.training or not chance:
            return output
        cu_seqlens = self.cu_seqlens[stream]
        # One more than there are views, for a stream's pad rows.
        kept = torch.rand(len(cu_seqlens), generator=self.random, device=output.device) >= chance
        return output * (kept / (1 - chance)).to(output.dtype)[segment_ids(cu_seqlens, len(output)), None]

    def pooled(self, packed: Packed, plan: MergePlan | None) -> Tensor:
        """Patches of V views -> the means of their tokens [V, D]."""
        streams = [packed.segments] * (len(self.encoder.network.blocks.layers) + 1) if plan is None else plan.segments
        self.cu_seqlens = [segments.cu_seqlens for segments in streams]
        return self.encoder.pool(self.encoder(packed, plan), packed)


def finetune(
    encoder: Encoder,
    train: LabelledSource,
    val: LabelledSource,
    config: InferenceConfig,
    seed: int = 0,
    counting: Counting = uncounted,
    training: FinetuneConfig | None = None,
) -> Iterator[tuple[str, float]]:
    """Yield `finetune`, and what comes with it (see `scores.classification`), of the last step: no step is chosen.

    AdamW learns from random crops, resized to the resolution that is scored. The ranks share the packs of a step. The
    encoder that is given does not change.

    Args:
        encoder: on the device to train on.
        train, val: images with labels; those of `val` should occur in `train`.
        config: how images are shown to the encoder.
        seed: of crops, order and dropping.
        counting: shows progress.
        training: how it is trained.

    Raises:
        UnreadableImage: no image of a source can be decoded.
        PlanError: fewer than two training images are large enough, or the ranks cannot share the packs of a step.
        NotFiniteError: gradients or features are not finite.
    """
    training = training or FinetuneConfig()
    assert train.catalog.labels is not None
    assert val.catalog.labels is not None
    classes = torch.from_numpy(np.unique(train.catalog.labels))
    noise = int(generator(seed, Purpose.PROTOCOL).integers(2**62)) + config.ranks.rank
    model = Classifier(encoder, len(classes), training.drop_path, noise).train()
    _train(model, train, classes, config, seed, counting, training)
    scored = _predict(model.eval(), val, config, counting)
    if config.ranks.main:
        logits, labels = (torch.cat(parts) for parts in zip(*scored, strict=True))
        yield from classification("finetune", logits, classes, labels)


def _train(
    model: Classifier,
    train: LabelledSource,
    classes: Tensor,
    config: InferenceConfig,
    seed: int,
    counting: Counting,
    training: FinetuneConfig,
) -> None:
    source, ranks, device = train.source, config.ranks, model.encoder.device
    own_packs = training.share(ranks.world)
    plan = _plan_of(train.catalog, model, config, seed, training)
    if plan.outline.too_small:
        left_out = plan.outline.too_small
        logger.warning("Skipped %d images of %s that are too small to fine-tune on.", left_out, source.name)
    steps = max(1, round(training.epochs * plan.outline.packs / training.packs_per_step))
    packs = itertools.islice(plan.packs(Cursor(0, 0), ranks.rank, ranks.world), steps * own_packs)
    dataset = PackDataset(
        source,
        train.catalog,
        model.encoder.config.patch_size,
        seed=seed,
        depth=model.encoder.config.depth,
        merge_rate=config.merge_rate,
        changes=AugmentConfig(flip=training.flip),
        channels=model.encoder.config.channels,
    )
    stream = iter(make_loader(dataset, packs, config.workers, pin_memory=pins_memory(device)))
    optimizer = torch.optim.AdamW(parameter_groups(model, training), lr=0.0, fused=True)
    classes = classes.to(device)
    unreadable: dict[int, str] = {}
    seen = 0
    norm: tuple[int, HostCopy] | None = None  # of the gradient of the last step
    with counting("finetune", steps) as progress:
        for step in range(steps):
            batches = [next(stream) for _ in range(own_packs)]
            unreadable |= {row: reason for batch in batches for row, reason in batch.unreadable}
            views = int(ranks.sums([sum(len(batch.image_ids) for batch in batches)])[0])
            if not views:
                continue
            seen += views
            for group in optimizer.param_groups:
                rate = warmup_cosine(step, steps, round(training.warmup * steps), training.lr, 0.0)
                group["lr"] = rate * group["share"]
            before, norm = norm, (step, _step(model, optimizer, batches, views, classes, config))
            # Check the previous step only now, so that the device computes this step while the host waits.
            _check_finite(before)
            progress(step + 1)
    _check_finite(norm)
    for found in ranks.gather(unreadable):
        unreadable |= found
    warn_of_unreadable(source, unreadable)
    need_images(seen, source)


def _plan_of(catalog: Catalog, model: Classifier, config: InferenceConfig, seed: int, training: FinetuneConfig) -> Plan:
    """Return the plan of packs of random crops, at the resolution that is scored."""
    views = DataConfig(
        tokens_per_pack=config.tokens_per_pack,
        packs_per_step=training.packs_per_step,
        min_resolution=config.resolution,
        max_resolution=config.resolution,
        min_crop=training.min_crop,
        max_view_tokens=config.tokens_per_pack,
    )
    return Plan(catalog, views, model.encoder.config.patch_size, seed)


def _step(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    views: int,
    classes: Tensor,
    config: InferenceConfig,
) -> HostCopy:
    """Train on the packs of this rank in a step, and return the norm of the gradient.

    Args:
        model: the model to train.
        optimizer: the optimizer of the model.
        batches: packs of this rank.
        views: number of views in the packs of all ranks.
        classes: [C] labels in the order of the logits, on the device.
        config: precision and ranks.
    """
    trainable, device = list(model.parameters()), classes.device
    for batch in batches:
        if len(batch.image_ids):
            moved = batch.to(device, non_blocking=True)
            assert moved.labels is not None
            with autocast(device, config.dtype):
                pooled = model.pooled(moved.packed, moved.merge_plan)
            targets = torch.searchsorted(classes, moved.labels)
            loss = F.cross_entropy(model.head(pooled), targets, reduction="sum")
            (loss / views).backward()
    config.ranks.sum_gradients(trainable)
    norm = nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return HostCopy(norm)


def _check_finite(norm: tuple[int, HostCopy] | None) -> None:
    """Check the gradient norm of a step. Do nothing if `norm` is None, because no step was made yet.

    Args:
        norm: the number of the step, from 0, and its gradient norm.

    Raises:
        NotFiniteError: it is not finite.
    """
    if norm is not None and not norm[1].read().isfinite():
        raise NotFiniteError(f"Fine-tuning diverged at step {norm[0]}. Lower --finetune.lr.")


def parameter_groups(model: Classifier, training: FinetuneConfig) -> list[dict[str, Any]]:
    """Group the parameters for AdamW by weight decay and by their share of the learning rate.

    The head and the last LayerNorm have a share of 1. Block l (from 0) has layer_decay ** (depth - l). Everything
    before the blocks has layer_decay ** (depth + 1). Vectors and position tables have no weight decay.
    """
    depth = len(model.encoder.network.blocks.layers)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.network.blocks.layers."):
            below = depth - int(name.split(".")[4])
        else:
            below = 0 if name.startswith(("head.", "encoder.network.blocks.")) else depth + 1
        decays = parameter.ndim > 1 and "positions" not in name
        setting = training.layer_decay**below, training.weight_decay if decays else 0.0
        groups.setdefault(setting, []).append(parameter)
    return [{"params": own, "share": share, "weight_decay": decay} for (share, decay), own in groups.items()]


@torch.inference_mode()
def _predict(
    model: Classifier, images: LabelledSource, config: InferenceConfig, counting: Counting
) -> list[tuple[Tensor, Tensor]]:
    """Logits [n, C] and labels int64 [n] of the readable images of each pack that has any; the main rank's."""

    def reduce(batch: Batch, layers: list[Tensor]) -> tuple[dict[int, str], list[tuple[Tensor, Tensor]]]:
        if not layers:
            return dict(batch.unreadable), []
        assert batch.labels is not None
        logits = model.head(model.encoder.pool(layers[-1], batch.packed))
        return dict(batch.unreadable), [(logits.cpu(), batch.labels.cpu())]

    packs = packs_of(model.encoder, images.catalog, config)
    scored: list[tuple[Tensor, Tensor]] = []
    unreadable: dict[int, str] = {}
    with counting(images.source.name, len(images.catalog.rows)) as progress:
        for left_out, shown in reduced_packs(model.encoder, images, packs, config, reduce):
            unreadable |= left_out
            scored += shown
            progress(sum(len(labels) for _, labels in scored))
    warn_of_unreadable(images.source, unreadable)
    if config.ranks.main:
        need_images(len(scored), images.source)
    return scored
