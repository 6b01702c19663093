"""Classification by attentive pooling of frozen tokens: what a small reader finds that sees single patches."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_enhanced.devices import all_cores
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.linear import calibrated_loss, stratified_split
from ijepa_enhanced.evaluate.scores import classification
from ijepa_enhanced.evaluate.tokens import (
    Counting,
    InferenceConfig,
    LabelledSource,
    Tokens,
    check_space,
    help_store,
    stored_tokens,
    uncounted,
)
from ijepa_enhanced.models.blocks import LAYER_NORM_EPS, init_weights
from ijepa_enhanced.packed import Segments, segment_ids
from ijepa_enhanced.randomness import Purpose, generator
from ijepa_enhanced.schedules import cosine

RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates to choose from."""
EPOCHS, LEAST_STEPS, BATCH, WEIGHT_DECAY = 20, 500, 256, 0.01
"""V-JEPA's epochs and weight decay (arXiv 2404.08471, appendix D.1), and more epochs where those are only few steps."""


class AttentiveClassifier(nn.Module):
    """One cross-attention block with a learned query, and a linear layer (V-JEPA, arXiv 2404.08471, section 4.3).

    Args:
        width: D of the tokens.
        heads: H, which divides D.
        classes: C.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, classes)
        init_weights(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens [T, D] of V images -> logits [V, C].

        With a single query, keys and values of all tokens need not be computed: the logit q (W x) is (q W) x, and the
        mean of values is the value of the mean. A bias of the keys would change nothing. That is D / H times cheaper.
        """
        width = tokens.shape[1]
        x = F.layer_norm(tokens.float(), (width,), eps=LAYER_NORM_EPS)  # scale and shift are in the layers that follow
        query = self.q(self.query).view(self.heads, -1)
        keys, values = (layer.weight.view(self.heads, -1, width) for layer in (self.k, self.v))
        logits = x @ torch.einsum("hk,hkd->dh", query, keys) / math.sqrt(query.shape[1])
        ids = segment_ids(cu_seqlens, len(x))
        shares = segment_softmax(logits, ids, len(cu_seqlens) - 1)
        zeros = x.new_zeros(len(cu_seqlens) - 1, width)
        means = [zeros.index_add(0, ids, share[:, None] * x) for share in shares.unbind(1)]
        read = torch.einsum("hvd,hkd->vhk", torch.stack(means), values).flatten(1) + self.v.bias
        y = self.query + self.proj(read)
        y = y + self.fc2(F.gelu(self.fc1(self.norm(y))))
        return self.head(y)


def segment_softmax(logits: Tensor, ids: Tensor, segments: int) -> Tensor:
    """The softmax of each column of `logits` [T, H] within each segment: `ids` int64 [T], below `segments`."""
    places = ids[:, None].expand_as(logits)
    highest = logits.new_full((segments, logits.shape[1]), -math.inf)
    highest = highest.scatter_reduce(0, places, logits.detach(), "amax")
    weights = torch.exp(logits - highest[ids])
    return weights / weights.new_zeros(highest.shape).index_add(0, ids, weights)[ids]


def attentive(
    encoder: Encoder,
    train: LabelledSource,
    val: LabelledSource,
    config: InferenceConfig,
    seed: int = 0,
    counting: Counting = uncounted,
) -> Iterator[tuple[str, float]]:
    """Yield `attentive`, and what comes with it (see `scores.classification`).

    All ranks run the encoder once over each source; the probe then reads stored tokens, on the main rank. The learning
    rate is the one of `RATES` whose probe has the lowest `calibrated_loss` on a fifth of `train`, stratified; that
    probe is trained again on all of it. If no class has two images, nothing can be held out, and the rate is the middle
    one.

    Args:
        encoder: in evaluation mode, on the device that the probe is trained on.
        train, val: images with labels; those of `val` should occur in `train`.
        config: how images are shown to the encoder.
        seed: of the held-out part, the probe's start and the order of images.
        counting: shows progress.

    Raises:
        RequestError: the tokens of both sources do not fit on the disk; nothing has been computed.
        UnreadableImage: no image of a source can be decoded.
        NotFiniteError: a feature is not finite.
    """
    check_space("attentive", encoder, (train, val), config)
    if not config.ranks.main:
        help_store(encoder, (train, val), config)
        return
    with (
        stored_tokens(encoder, train, config, counting) as train_tokens,
        stored_tokens(encoder, val, config, counting) as val_tokens,
        all_cores(),
    ):
        assert train_tokens.labels is not None
        assert val_tokens.labels is not None
        classes, numbers = torch.unique(train_tokens.labels, return_inverse=True)
        fitted, held_out = stratified_split(numbers, generator(seed, Purpose.HOLDOUT))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(seed, Purpose.PROTOCOL).integers(2**63)))
            start = AttentiveClassifier(encoder.width, encoder.config.heads, len(classes))
        start.to(encoder.device)
        best = RATES[len(RATES) // 2]
        if len(held_out):
            losses = []
            for rate in RATES:
                probe = _trained(start, train_tokens, numbers, fitted, rate, seed, counting)
                losses.append(calibrated_loss(_logits(probe, train_tokens, held_out), numbers[held_out]))
            best = RATES[int(torch.stack(losses).argmin())]
        probe = _trained(start, train_tokens, numbers, torch.arange(len(numbers)), best, seed, counting)
        logits, labels = _logits(probe, val_tokens, torch.arange(len(val_tokens.labels))), val_tokens.labels
    yield from classification("attentive", logits, classes, labels)


def _trained(
    start: AttentiveClassifier,
    tokens: Tokens,
    numbers: Tensor,
    images: Tensor,
    rate: float,
    seed: int,
    counting: Counting,
) -> AttentiveClassifier:
    """Return a copy of `start`, trained on some of the images by AdamW, from `rate` to 0 on half a cosine."""
    probe = copy.deepcopy(start)
    rng = generator(seed, Purpose.PROTOCOL, view=1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    batches = math.ceil(len(images) / BATCH)
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / batches))
    with counting(f"attentive, learning rate {rate:g}", epochs) as progress:
        for epoch in range(epochs):
            order = images[torch.from_numpy(rng.permutation(len(images)))]
            for number, some in enumerate(order.tensor_split(batches)):
                optimizer.param_groups[0]["lr"] = cosine(epoch * batches + number, epochs * batches, rate, 0.0)
                loss = F.cross_entropy(_shown(probe, tokens, some), numbers[some].to(probe.query.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress(epoch + 1)
    return probe


@torch.no_grad()
def _logits(probe: AttentiveClassifier, tokens: Tokens, images: Tensor) -> Tensor:
    return torch.cat([_shown(probe, tokens, some).cpu() for some in images.split(BATCH)])


def _shown(probe: AttentiveClassifier, tokens: Tokens, images: Tensor) -> Tensor:
    """Return the probe's logits of some images."""
    device = probe.query.device
    ends = tokens.lengths.cumsum(0)
    rows = [torch.arange(int(ends[i] - tokens.lengths[i]), int(ends[i])) for i in images]
    segments = Segments.of(tokens.lengths[images].tolist())
    return probe(tokens.values[torch.cat(rows)].to(device), segments.cu_seqlens.to(device))
