"""Images as Python users give them: paths, bytes, arrays, tensors and PIL images become patches, and packs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ijepa_enhanced.data.bands import Bands, of_array
from ijepa_enhanced.data.decode import decode_views, patchify
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.loader import serve_the_parent
from ijepa_enhanced.data.opening import FAILURES, Opened, open_image, upright_size
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.packed import Packed

logger = logging.getLogger(__name__)

ImageLike = Opened | NDArray[Any] | Tensor | bytes | str | Path
"""A PIL image, an array [height, width, C], a tensor [C, height, width], or the bytes or the path of an image file.
Arrays and tensors are uint8 or uint16, or floats if C is not 3."""


class Decoded(NamedTuple):
    """One image as patches, or the reason why there are none."""

    key: str | None
    """Its key in a source or its path; None if it has neither."""
    patches: NDArray[Any] | None
    """[rows * columns, P * P * C], row by row."""
    grid: NDArray[np.int64]
    """[1, 2] rows and columns."""
    error: Exception | None = None
    fatal: bool = False
    """Whether the error is the caller's mistake: what is no image at all, or a generator that fails."""


class PackBuilder:
    """Decoded images that wait to go through the network together.

    Args:
        budget: largest number of tokens, unless one image alone has more.
        prefix: see `Packed.prefix`.
    """

    def __init__(self, budget: int, prefix: int = 0) -> None:
        self.budget = budget
        self.prefix = prefix
        self.tokens = 0
        self.views: list[NDArray[Any]] = []
        self.grids: list[NDArray[np.int64]] = []

    def __len__(self) -> int:
        return len(self.views)

    def fits(self, patches: NDArray[Any]) -> bool:
        """Return whether an image with these patches fits into the budget. An empty pack takes any image."""
        return not self.views or self.tokens + len(patches) <= self.budget

    def add(self, patches: NDArray[Any], grid: NDArray[np.int64]) -> None:
        """Add an image to the pack."""
        self.tokens += len(patches)
        self.views.append(patches)
        self.grids.append(grid)

    def take(self) -> Packed:
        """Return the images as one stream, and start a new pack. If one is float32, the whole stream is."""
        packed = Packed.of_grids(np.concatenate(self.views), np.concatenate(self.grids), self.prefix)
        self.tokens, self.views, self.grids = 0, [], []
        return packed


def in_packs(
    images: Iterable[Decoded], budget: int, on_error: str = "raise", prefix: int = 0
) -> Iterator[tuple[list[tuple[str, bool]], Packed | None]]:
    """Yield packs of decoded images, in order.

    Args:
        images: decoded images, or images with an error.
        budget, prefix: as for `PackBuilder`.
        on_error: whether to "raise" the error of an image. The images before it come first.

    Yields:
        The key of each image (its number as text if it has none) and whether the image is in the pack, which it is
        unless it has an error; and the pack, or None if no image is in it.
    """
    pack = PackBuilder(budget, prefix)
    members: list[tuple[str, bool]] = []
    failure: Exception | None = None
    for number, image in enumerate(images):
        if image.error is not None and (image.fatal or on_error == "raise"):
            failure = image.error
            del image
            break
        if image.patches is not None:
            if not pack.fits(image.patches):
                yield members, pack.take()
                members = []
            pack.add(image.patches, image.grid)
        key = str(number) if image.key is None else image.key
        if image.error is not None:
            reason = str(image.error)
            logger.warning("Not embedded: %s", reason if reason.startswith(key) else f"{key}: {reason}")
        members.append((key, image.patches is not None))
        del image  # frees it before a generator makes the next one
    if members:
        yield members, pack.take() if len(pack) else None
    if failure is not None:
        try:
            raise failure
        finally:
            # An error that refers to itself, through its traceback and this frame, would keep the workers alive.
            del failure


def check_several(images: object) -> None:
    """Check that `images` is not a single image.

    Raises:
        TypeError: it is.
    """
    single = isinstance(images, (str, bytes, Path, Image.Image)) or (isinstance(images, Tensor) and images.ndim < 4)
    if single or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise TypeError("images must be a list of images, even for a single image.")


def decode_input(
    image: ImageLike, resolution: int | None, patch_size: int, limit: int, channels: int = CHANNELS
) -> Decoded:
    """Return the patches of an image.

    Args:
        image: of any kind.
        resolution: sqrt(height * width) in pixels after resizing; None: native size.
        patch_size: P.
        limit: largest number of tokens.
        channels: C, see `decode_views`.

    Raises:
        UnreadableImage: it cannot be decoded; the message names its path if it is one.
        OSError: the file cannot be read.
        TypeError: it is not an image, or an array of another type or shape.
    """
    try:
        return _patches(_open(image, channels), resolution, patch_size, limit, channels)
    except UnreadableImage as error:
        raise UnreadableImage(f"{image}: {error}" if isinstance(image, (str, Path)) else str(error)) from error


def decode_all(
    images: Source | Iterable[ImageLike],
    resolution: int | None,
    patch_size: int,
    limit: int,
    workers: int,
    channels: int = CHANNELS,
) -> Iterator[Decoded]:
    """Yield all images as patches, in order, decoded by worker processes; arguments as for `decode_input`.

    An image that cannot be decoded has its error. So has a last one that stands for what a generator of images raised.
    """
    source = images if isinstance(images, Source) else None
    failures: list[Decoded] = []

    def drawn() -> Iterator[Any]:
        # The loader draws images ahead of those that it returns. An error that went through it would lose them.
        try:
            yield from range(len(images)) if isinstance(images, Source) else map(_portable, images)
        except Exception as error:  # any, as it is the caller's generator
            failures.append(_failed(None, error, fatal=True))

    loader = DataLoader(
        _Decoder(source, resolution, patch_size, limit, channels),
        sampler=drawn(),  # passed to the dataset one by one, so that a generator need not hold more than a few images
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=serve_the_parent,
        generator=torch.Generator(),  # of its own: PyTorch would draw a seed from the caller's
    )
    yield from loader
    yield from failures


class _Decoder(Dataset[Decoded]):
    """Decodes rows of a source, or images, in a worker."""

    def __init__(
        self, source: Source | None, resolution: int | None, patch_size: int, limit: int, channels: int
    ) -> None:
        self.source = source
        self.how = (resolution, patch_size, limit, channels)

    def __getitem__(self, item: Any) -> Decoded:
        if isinstance(item, Decoded):  # its error was found before it could be sent here
            return item
        key = str(item) if isinstance(item, (str, Path)) else None
        try:
            if self.source is None:
                return decode_input(item, *self.how)._replace(key=key)
            key = self.source.key(item)
            return _patches(self.source.open(item), *self.how)._replace(key=key)
        except (UnreadableImage, OSError, TypeError) as error:
            # As a value: raised in a worker, it would reach the user as a traceback in a string.
            named = f"{key}: {error}" if isinstance(error, UnreadableImage) and self.source is not None else None
            return _failed(key, UnreadableImage(named) if named else error, fatal=isinstance(error, TypeError))


def _failed(key: str | None, error: Exception, fatal: bool = False) -> Decoded:
    return Decoded(key, None, np.empty((0, 2), np.int64), error, fatal)


def _as_is(item: Any) -> Any:
    """Return the item. The default `collate_fn` would turn arrays into tensors."""
    return item


def _portable(image: Any) -> Any:
    """Return an image as something that can be sent to another process, or its error.

    An image that is opened and not yet decoded holds an open file, which cannot be sent. A tensor on a GPU would need
    a CUDA context in the worker.
    """
    if isinstance(image, Tensor):
        return image.cpu()
    if not isinstance(image, Image.Image):
        return image
    try:
        data = _unread_file(image)
        if data is not None:
            return data
        image.load()
        return image.copy()  # without the file and the plugin that it came from
    except FAILURES as error:
        return _failed(None, UnreadableImage(f"cannot be decoded: {error}"))


def _patches(image: Opened, resolution: int | None, patch_size: int, limit: int, channels: int) -> Decoded:
    size = np.array([upright_size(image)])  # [1, 2]: height and width, turned by the EXIF orientation
    grid = fit_grids(size[:, 0], size[:, 1], resolution, patch_size, limit=limit)
    # The box (top, left, height, width) is the whole image: nothing is cropped.
    (view,) = decode_views(image, np.concatenate([0 * size, size], axis=1), grid * patch_size, channels=channels)
    return Decoded(None, patchify(view, patch_size), grid)


def _open(image: ImageLike, channels: int) -> Opened:
    """Open an image of any kind. Errors as for `decode_input`."""
    if isinstance(image, Bands):
        return image
    if isinstance(image, Image.Image):
        data = _unread_file(image)
        return image if data is None else open_image(data)
    if isinstance(image, (Tensor, np.ndarray)):
        return _of_array(image, channels)
    if isinstance(image, bytes):
        return open_image(image)
    if not isinstance(image, (str, Path)):
        raise TypeError(
            f"An image must be a PIL image, a NumPy array, a tensor, bytes or a path, not {type(image).__name__}."
        )
    return open_image(Path(image).read_bytes())


def _of_array(image: Tensor | NDArray[Any], channels: int) -> Bands:
    """Open an array or a tensor. Errors as for `decode_input`."""
    tensor = isinstance(image, Tensor)
    array = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) else image
    # RGB floats may go up to 1 or to 255, or be normalized already. The array does not tell which.
    floats = channels != CHANNELS
    known = array.dtype in (np.uint8, np.uint16) or (floats and array.dtype.kind == "f")
    if not known or array.ndim != 3 or array.shape[2] != channels:
        what, axes = (
            ("A tensor", f"[{channels}, height, width]") if tensor else ("An array", f"[height, width, {channels}]")
        )
        kinds = "uint8, uint16 or float" if floats else "uint8 or uint16"
        raise TypeError(f"{what} must be {kinds} {axes}, not {image.dtype} {[*image.shape]}.")
    return of_array(array)


def _unread_file(image: Image.Image) -> bytes | None:
    """Return the file of an image that was opened and not yet decoded, so that it gives what its path gives.

    None for an image whose pixels are loaded, which may differ from its file, or that shows a later frame of it.
    """
    file = getattr(image, "fp", None)
    if file is None or isinstance(file, io.BytesIO) or image.tell() != 0:
        return None
    try:
        position = file.tell()
        file.seek(0)
        data: bytes = file.read()
        file.seek(position)
    except (OSError, ValueError):  # the file is closed, or cannot be read twice
        return None
    return data
