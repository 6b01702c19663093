"""`Encoder`: a network with its preprocessing, and the Python interface to both."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor, nn

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.inputs import (
    Decoded,
    ImageLike,
    check_several,
    decode_all,
    decode_input,
    in_packs,
)
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype, default_workers
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.hub import create, fetch_card, upload
from ijepa_enhanced.merge_plan import MergePlan, plan_merges
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing, Record
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.positions import within_grid
from ijepa_enhanced.ops.preprocess import Normalize
from ijepa_enhanced.packed import Packed, Segments
from ijepa_enhanced.pretrained import Pretrained, WhichEncoder, load, save

logger = logging.getLogger(__name__)

TOKENS_PER_PACK = 16384
"""Default for the largest number of tokens of an image, and in memory at once."""

CPU_TOKENS = 4096
"""Largest number of tokens in memory at once on a CPU, unless one image has more. Measured in docs/log.md: larger packs
are slower, except with strong merging in bfloat16."""

FAR = (0.5, 1.5)
"""Resolutions below or above these multiples of the trained one cause a warning. Up to 1.5 times the trained resolution
scores about as well (docs/measurements.md). Smaller resolutions were not measured. A learned table of positions counts
as trained too: DINOv2's is for 518 px, although its images have 224 px by default."""

Resolution = int | Literal["native"] | None
"""sqrt(height * width) in pixels after resizing, which keeps the aspect ratio. `native`: images keep their size. None:
the resolution that the encoder was trained at."""

Precision = Literal["auto", "fp32", "bf16"]


class Encoder(nn.Module):
    """A network with its preprocessing. It turns images of any size into features::

        encoder = Encoder.from_pretrained("runs/pets")
        z = encoder.embed(["a.jpg", "b.png"])  # [2, D]

    Args:
        network: the vision transformer, which is not copied.
        preprocessing: how images become its input.
        origin: the released weights that it was imported from, or that its training started from; None: none.
        record: what is known of its training and its scores, for the model card; None: nothing.
    """

    def __init__(
        self,
        network: VisionTransformer,
        preprocessing: Preprocessing,
        origin: Origin | None = None,
        record: Record | None = None,
    ) -> None:
        super().__init__()
        if preprocessing.pooling == "cls" and not network.config.class_token:
            raise ValueError("pooling must be mean, because the network has no class token.")
        if preprocessing.channels != network.config.channels:
            raise ValueError(
                f"channels must be {network.config.channels}, as in the network, not {preprocessing.channels}."
            )
        self.network = network
        self.preprocessing = preprocessing
        self.origin = origin
        self.record = record or Record()
        self.normalize = Normalize(preprocessing.mean, preprocessing.std, network.config.patch_size)
        self.to(next(network.parameters()).device)  # the buffers of `normalize` join the network
        self.warned: set[int] = set()
        """Resolutions far from the trained one that a warning was logged for."""

    @classmethod
    def random(cls, config: Architecture, preprocessing: Preprocessing, seed: int) -> Encoder:
        """Return an untrained encoder in evaluation mode on the CPU: the one that a run with this seed starts from."""
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random generator as it is
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            return cls(VisionTransformer(config), preprocessing).eval()

    @property
    def config(self) -> Architecture:
        """Return the architecture of the network."""
        return self.network.config

    @property
    def width(self) -> int:
        """Return D, the width of a feature."""
        return self.network.width

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return self.normalize.scale.device

    def forward(self, packed: Packed, plan: MergePlan | None = None) -> Tensor:
        """Return the features [T, D] of patches of pixels [T, P * P * C]; see `VisionTransformer.forward`."""
        features: Tensor = self.network(self.preprocess(packed), plan)
        return features

    def last_layers(self, packed: Packed, plan: MergePlan | None, count: int) -> list[Tensor]:
        """Return the outputs [T, D] of the last `count` blocks for patches of pixels [T, P * P * C]."""
        return self.network.last_layers(self.preprocess(packed), plan, count)

    def pool(self, features: Tensor, packed: Packed) -> Tensor:
        """Return the feature of each view, float32 [V, D], from those of its tokens [T, D]; see `Preprocessing`."""
        return self.network.pool(features, packed.segments.cu_seqlens, self.preprocessing.pooling)

    def preprocess(self, packed: Packed) -> Packed:
        """Return the input of the network for patches of pixels: normalized, on grids no longer than in training."""
        packed = self.normalize(packed)
        if self.preprocessing.trained_grid is not None:
            packed = within_grid(packed, self.preprocessing.trained_grid)
        return packed

    def embed(
        self,
        images: Iterable[ImageLike],
        resolution: Resolution = None,
        merge_rate: float | Sequence[float] = 0.0,
        precision: Precision = "auto",
        tokens_per_pack: int = TOKENS_PER_PACK,
    ) -> Tensor:
        """Return one feature for each image: the mean of its patches, or its class token (`Preprocessing.pooling`).

        A path, the bytes of that file, and a PIL image that was just opened from it give the same feature. A PIL image
        whose pixels are already loaded gives a slightly different one if it comes from a large JPEG file, which is
        otherwise decoded at a fraction of its size.

        Args:
            images: N images of any size. They are read one at a time, so a generator need not hold more than one.
            resolution: the resolution to resize images to; see `Resolution`.
            merge_rate: share of its tokens that each layer merges into others, from 0 to 0.5; one for all layers, or
                one for each. Merging is faster and less accurate (docs/measurements.md).
            precision: of matrix products. `auto` follows `torch.autocast` if it is entered. Otherwise it is float32 on
                a CPU, and bfloat16 on a GPU that supports it.
            tokens_per_pack: largest number of tokens of an image, and in memory at once. If memory is short, lower it,
                and `resolution` if it needs more. A CPU takes at most 4,096 at once, unless one image has more.

        Returns:
            float32 [N, D] on the encoder's device.

        Raises:
            UnreadableImage: an image cannot be decoded. The message says why and, for a path, which one.
            OSError: a file cannot be read.
            TypeError: an item is not an image, or `images` is a single image.
            ValueError: a merge rate, a resolution or the precision is out of range.
        """
        pooled = [
            self.pool(features, packed)
            for packed, features in self._features(images, resolution, merge_rate, precision, tokens_per_pack)
        ]
        return torch.cat(pooled) if pooled else torch.empty(0, self.width, device=self.device)

    def embed_iter(
        self,
        images: str | Path | Source | Iterable[ImageLike],
        workers: int | None = None,
        on_error: Literal["raise", "skip", "nan"] = "raise",
        resolution: Resolution = None,
        merge_rate: float | Sequence[float] = 0.0,
        precision: Precision = "auto",
        tokens_per_pack: int = TOKENS_PER_PACK,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the key and the feature of each image, in order. Memory does not grow with the number of images.

        Args:
            images: a source, written as for `ijepa train`, or images as for `embed`.
            workers: processes that decode images; 0 decodes in this process. None: one for each core at hand.
            on_error: what to do if an image cannot be decoded. `raise` an UnreadableImage, `skip` the image, or yield a
                feature of `nan`.
            resolution, merge_rate, precision, tokens_per_pack: as for `embed`.

        Yields:
            The key of the image in its source, or else its path, or else its number as text; and its feature, float32
            [D], on the host.

        Raises:
            SourceError: the source does not exist.
            ValueError: `on_error` is not one of the three; or as for `embed`.
            UnreadableImage, OSError, TypeError: as for `embed`.
        """
        if on_error not in ("raise", "skip", "nan"):
            raise ValueError(f"on_error must be raise, skip or nan, not '{on_error}'.")
        if isinstance(images, (str, Path)):
            images = open_source(str(images))
        if isinstance(images, Source):
            open_catalog(images)  # lists the images once and for all workers
        else:
            check_several(images)
        workers = default_workers() if workers is None else workers
        decoded = decode_all(
            images,
            self.pixels(resolution, tokens_per_pack),
            self.config.patch_size,
            tokens_per_pack,
            workers,
            self.config.channels,
        )
        return self._embedded(decoded, on_error, merge_rate, precision, tokens_per_pack)

    def _embedded(
        self,
        images: Iterable[Decoded],
        on_error: str,
        merge_rate: float | Sequence[float],
        precision: Precision,
        tokens_per_pack: int,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the key and the feature of each image; arguments as for `embed_iter`."""
        for members, packed in in_packs(images, self.at_once(tokens_per_pack), on_error, self.config.prefix):
            features = (
                feature
                for pack, x in self._run([packed] if packed else [], merge_rate, precision)
                for feature in self.pool(x, pack).cpu()
            )
            for key, readable in members:
                if readable:
                    yield key, next(features)
                elif on_error == "nan":
                    yield key, torch.full((self.width,), torch.nan)

    def feature_maps(
        self,
        images: Iterable[ImageLike],
        resolution: Resolution = None,
        merge_rate: float | Sequence[float] = 0.0,
        precision: Precision = "auto",
        tokens_per_pack: int = TOKENS_PER_PACK,
    ) -> list[Tensor]:
        """Return the features of each image on its grid: N tensors [rows, columns, D]; arguments as for `embed`."""
        maps: list[Tensor] = []
        for packed, features in self._features(images, resolution, merge_rate, precision, tokens_per_pack):
            # Tokens of a view are in row-major order, and merged ones are spread over their patches again.
            views = torch.split(features, list(packed.segments.lengths))
            patches = (view[packed.prefix :] for view in views)
            maps += [view.view(*grid, self.width) for view, grid in zip(patches, packed.grids.tolist(), strict=True)]
        return maps

    def patch_tokens(
        self,
        images: Iterable[ImageLike],
        resolution: Resolution = None,
        merge_rate: float | Sequence[float] = 0.0,
        precision: Precision = "auto",
        tokens_per_pack: int = TOKENS_PER_PACK,
    ) -> list[Tensor]:
        """Return the features of each image's patches, row by row: N tensors [patches, D]; arguments as for `embed`."""
        maps = self.feature_maps(images, resolution, merge_rate, precision, tokens_per_pack)
        return [features.flatten(0, 1) for features in maps]

    def _features(
        self,
        images: Iterable[ImageLike],
        resolution: Resolution,
        merge_rate: float | Sequence[float],
        precision: Precision,
        tokens_per_pack: int,
    ) -> Iterator[tuple[Packed, Tensor]]:
        """Yield packs of decoded images and their features; arguments as for `embed`."""
        return self._run(self.packs(images, resolution, tokens_per_pack), merge_rate, precision)

    def _run(
        self, packs: Iterable[Packed], merge_rate: float | Sequence[float], precision: Precision
    ) -> Iterator[tuple[Packed, Tensor]]:
        """Yield each pack on the encoder's device, and its features float32 [T, D]."""
        if precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, not '{precision}'.")
        # `auto` is float32 on a CPU. On a GPU it is bfloat16, because the varlen kernel needs it (ops/attention.py).
        as_it_is = precision == "auto" and (self.device.type == "cpu" or torch.is_autocast_enabled(self.device.type))
        for packed in packs:
            plan = self.merge_plan(packed.segments, merge_rate)  # before the move, from lengths on the host
            moved = packed.to(self.device)
            products = nullcontext() if as_it_is else autocast(self.device, autocast_dtype(precision, self.device))
            # Around the network only: `yield` must not run the caller's code under no_grad or autocast.
            # Not inference_mode, whose tensors cannot be the input of a layer that is trained on top.
            with torch.no_grad(), products:
                features = self(moved, plan and plan.to(self.device))
            yield moved, features.float()

    def packs(
        self,
        images: Iterable[ImageLike],
        resolution: Resolution = None,
        tokens_per_pack: int = TOKENS_PER_PACK,
    ) -> Iterator[Packed]:
        """Yield the packs of patches that `embed` runs the network on, on the CPU; arguments as for `embed`."""
        check_several(images)
        decode = partial(
            decode_input,
            resolution=self.pixels(resolution, tokens_per_pack),
            patch_size=self.config.patch_size,
            limit=tokens_per_pack,
            channels=self.config.channels,
        )
        for _, packed in in_packs(map(decode, images), self.at_once(tokens_per_pack), prefix=self.config.prefix):
            assert packed is not None  # an image that cannot be decoded has raised its error
            yield packed

    def pixels(self, resolution: Resolution, limit: int = TOKENS_PER_PACK) -> int | None:
        """Return the resolution in pixels, or None for native size, and warn if it is far from the trained one.

        Args:
            resolution: see `embed`.
            limit: most patches of an image.

        Raises:
            RequestError: the resolution is not a positive integer, or a square image has more than `limit` patches.
        """
        if resolution is None:
            return self.preprocessing.resolution
        if resolution == "native":
            return None
        if not isinstance(resolution, int) or resolution < 1:
            raise RequestError(f"resolution must be a positive integer (pixels), or 'native', not {resolution!r}.")
        self.check_limit(resolution, limit)
        self.check_resolution(resolution)
        return resolution

    def check_limit(self, resolution: int | None, limit: int = TOKENS_PER_PACK) -> None:
        """Raise RequestError if a square image of this resolution has more than `limit` patches."""
        largest = math.isqrt(limit) * self.config.patch_size
        if resolution is not None and resolution > largest:
            raise RequestError(
                f"resolution must be at most {largest} px, not {resolution}: an image may have {limit:,} patches of "
                f"{self.config.patch_size} px. In Python, tokens_per_pack raises this limit."
            )

    def check_resolution(self, resolution: int | None) -> None:
        """Log a warning, once for each resolution, if images would be much smaller or larger than in training."""
        trained = self.preprocessing.resolution
        if resolution is None or trained is None:
            return
        native = 0.0
        if self.config.positions == "table":
            native = math.prod(self.config.position_grid) ** 0.5 * self.config.patch_size
        low, high = FAR
        if not low * trained <= resolution <= high * max(trained, native) and resolution not in self.warned:
            self.warned.add(resolution)
            logger.warning(
                "The encoder was trained at a resolution of %d px but is used at %d px, where its features may be "
                "worse. Omit the resolution to use the training resolution.",
                trained,
                resolution,
            )

    def at_once(self, tokens: int) -> int:
        """Return the largest number of tokens to compute at once: `tokens`, but at most `CPU_TOKENS` on a CPU."""
        return tokens_at_once(self.device, tokens)

    def merge_plan(self, segments: Segments, rate: float | Sequence[float]) -> MergePlan | None:
        """Return the plan for merging views of these lengths at `rate`, on the CPU, or None if nothing merges."""
        return plan_merges(segments.lengths, rate, self.config.depth, self.config.prefix)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`, and create it if needed.

        The card is `README.md` (docs/weights.md). One that somebody wrote or edited is kept.

        Raises:
            OSError: a file cannot be written, as on a full disk.
        """
        save(Path(folder), self.described)

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the encoder to the Hugging Face Hub: the files that `save_pretrained` writes.

        A model card that somebody wrote or edited on the Hub is kept, unless the encoder was loaded with one.

        Args:
            repo_id: NAME/MODEL, or MODEL for one of your own. It is created if it does not exist.
            private: whether a new repository is private. None: as your organization has set it, or else public.

        Returns:
            The URL of the commit.

        Raises:
            RequestError: there is no network, you are not logged in, or you may not write to it.
            OSError: the files cannot be written into a temporary folder first.
        """
        name = create(repo_id, private)
        with TemporaryDirectory() as folder:
            if self.record.card is None:
                fetch_card(name, Path(folder))  # `save` keeps it if it was edited
            save(Path(folder), self.described, name)
            return upload(Path(folder), name)

    @property
    def described(self) -> Pretrained:
        """Return what is saved: the network, and what is known about it."""
        record = self.record
        if record.scores and record.scores["weights"] != hash_weights(self):
            record = dataclasses.replace(record, scores=None)  # the network was trained since
        return Pretrained(self.network, self.preprocessing, self.origin, record)

    @classmethod
    def from_pretrained(cls, path: str | Path, encoder: WhichEncoder = "target") -> Encoder:
        """Load an encoder, in evaluation mode, on the CPU (docs/weights.md).

        Args:
            path: a run; a folder that `save_pretrained`, transformers or timm wrote; a checkpoint of I-JEPA's own code;
                a file of weights with their config.json beside it; or the id of a model on the Hugging Face Hub, such
                as `facebook/dinov2-small`, or `facebook/dinov2-small@REVISION`.
            encoder: which encoder of an I-JEPA checkpoint.

        Raises:
            EncoderError: there is no encoder, or one of an older version, or a damaged one, or one whose architecture
                is not known.
            NotFiniteError: a weight is not finite.
        """
        loaded = load(path, encoder)
        return cls(loaded.network, loaded.preprocessing, loaded.origin, loaded.record).eval()


def tokens_at_once(device: torch.device, tokens: int) -> int:
    """Return the largest number of tokens to compute at once on a device; see `Encoder.at_once`."""
    return min(tokens, CPU_TOKENS) if device.type == "cpu" else tokens


def hash_weights(encoder: Encoder) -> str:
    """Return the SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, weights in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
