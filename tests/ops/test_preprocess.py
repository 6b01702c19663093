"""A view has the same colors in every pack, in full precision, before it is normalized."""

import numpy as np
import pytest
import torch

from ijepa_enhanced.batch import Colors
from ijepa_enhanced.ops.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalize
from ijepa_enhanced.packed import Packed

PATCH = 4
GRIDS = [(2, 3), (1, 1), (4, 5), (3, 2)]


@pytest.fixture
def views() -> tuple[list[Packed], Colors]:
    rng = np.random.default_rng(0)
    streams = [
        Packed.of_grids(rng.integers(0, 256, (rows * cols, PATCH**2 * 3), dtype=np.uint8), np.array([[rows, cols]]))
        for rows, cols in GRIDS
    ]
    affine = np.eye(3, 4) + rng.normal(0, 0.3, (len(GRIDS), 3, 4))
    affine[..., 3] *= 255
    return streams, Colors(torch.tensor(affine, dtype=torch.float32), torch.tensor([True, False, False, True]))


def test_colors_are_changed_cut_off_solarized_and_normalized(views: tuple[list[Packed], Colors]) -> None:
    streams, colors = views
    found = Normalize(IMAGENET_MEAN, IMAGENET_STD, PATCH)(Packed.concatenate(streams), colors).split()
    for view, (stream, patches) in enumerate(zip(streams, found, strict=True)):
        affine = colors.affine[view].double().numpy()
        pixels = stream.values.reshape(-1, 3).numpy() @ affine[:, :3].T + affine[:, 3]
        pixels = pixels.clip(0, 255)
        if colors.solarized[view]:
            pixels = np.where(pixels < 127.5, pixels, 255 - pixels)
        expected = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
        np.testing.assert_allclose(patches.reshape(-1, 3).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [1], [3, 3, 0]])
def test_a_view_has_the_same_colors_in_every_pack(views: tuple[list[Packed], Colors], order: list[int]) -> None:
    streams, colors = views
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, PATCH)
    alone = [normalize(stream, colors.select(torch.arange(4) == view)).values for view, stream in enumerate(streams)]
    pack = Packed.concatenate([streams[view] for view in order])
    packed = normalize(pack, Colors(colors.affine[order], colors.solarized[order])).split()
    for view, patches in zip(order, packed, strict=True):
        assert torch.equal(patches, alone[view])


def test_autocast_rounds_no_colors(views: tuple[list[Packed], Colors]) -> None:
    streams, colors = views
    pack, normalize = Packed.concatenate(streams), Normalize(IMAGENET_MEAN, IMAGENET_STD, PATCH)
    expected = normalize(pack, colors).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normalize(pack, colors).values, expected)
