"""The built-in labeled images: an object of one of ten shapes on a background with clutter.

They are computed from (seed, part, row) and never stored, so that everything runs without a download. A class is a
shape. As in photographs, its images also tend to have other things in common: the texture of the object, the texture of
the background, the step in hue between them, and the kind of clutter. Each of these is shared with other classes, and
only a part of the images follows it. The size of the image, the area and the rotation of the object, and light and hue
of the background do not depend on the class. docs/measurements.md has the scores of simple features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import cos, exp, hypot, log, pi, sin, sqrt
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

_Array = NDArray[np.float64]
_Shape = Callable[[_Array, _Array], _Array]

BANDS = np.array(
    [
        [0.0, 0.1, 0.9],
        [0.1, 0.8, 0.1],
        [0.9, 0.1, 0.0],
        [0.7, 0.6, -0.3],
        [-0.3, 0.7, 0.6],
        [0.6, -0.3, 0.7],
    ]
)
"""[6, 3]: how the bands of `render_bands` mix red, green and blue. The first three are mostly blue, green and red, in
the order that satellites use."""
BAND_RANGES = np.array([[900, 5000], [800, 6000], [700, 8000], [900, 12000], [1500, 20000], [400, 30000]])
"""[6, 2]: values of each band for black and for white, out of 65,535. Like a real sensor, the bands do not use the full
range."""

VERSION = 2
"""Raised by any change of a size, a label or a pixel. Scores on two versions cannot be compared."""
IMAGES = {"train": 4096, "val": 1024}
"""Images of each part."""

# The numbers of this module are frozen with VERSION. They were chosen for how the images look, and so that simple
# features tell little and training helps (docs/log.md), before any setting of training was chosen on the images.
_SIDES = (40, 200)  # pixels
_ASPECT = 2.9  # rounding to whole pixels then stays within 1:3
_EXTENT = (0.38, 0.7)  # square root of the object's area, in units of the shorter side
_CUT = 0.5  # an object may extend beyond the edge by up to this part of its reach
_SQUASH = 1.3  # the object's own axes are stretched against each other by up to this
_LEAN = 0.4  # radians by which textures turn at most
_TENDENCY = 0.8  # probability that a texture, the step in hue or a piece of clutter follows the class


class _Look(NamedTuple):
    """How a texture looks."""

    field: int  # which case of `_texture`
    wave: float  # its length, in units of the shorter side of the image; not used by gradients
    angle: float  # in radians; not used by clouds


class _Tendency(NamedTuple):
    """What most images of a class have in common, besides the shape."""

    surface: _Look  # of the object
    ground: _Look  # of the background
    hue: float  # of the object minus that of the background, in turns of the color circle
    sticks: bool  # whether clutter is sticks rather than blobs


_SURFACES = (_Look(1, 0.16, 0), _Look(2, 0.1, pi / 2), _Look(3, 0.13, pi / 4), _Look(4, 0.08, 0), _Look(0, 0.2, pi / 2))
_GROUNDS = (_Look(4, 0.15, 0), _Look(1, 0.1, pi / 2), _Look(0, 0.2, pi / 4), _Look(2, 0.16, 0), _Look(5, 0.08, pi / 2))
_HUES = (0.0, 0.6, 0.2, 0.8, 0.4, 0.2, 0.8, 0.4, 0.0, 0.6)
# No tendency tells the class alone: two classes share each surface, each ground and each step of hue, and five each
# kind of clutter.
_TENDENCIES = tuple(
    _Tendency(_SURFACES[label % 5], _GROUNDS[label // 2], hue, label in (0, 3, 4, 7, 8))
    for label, hue in enumerate(_HUES)
)


@dataclass(frozen=True)
class Sample:
    """One image of h x w pixels with its object."""

    pixels: NDArray[np.uint8]
    """[h, w, 3], RGB."""
    label: int
    """Row of `CLASSES`."""
    mask: NDArray[np.bool_]
    """[h, w]: the part of the object inside the image, also where clutter lies on it."""


def header(part: str, row: int, seed: int = 0) -> tuple[int, int, int]:
    """Return height and width in pixels and label of an image, without drawing it.

    Raises:
        KeyError: there is no such part.
        IndexError: the part has no such row.
        OverflowError: the seed is negative or has more than 64 bits.
    """
    return _begin(part, row, seed)[1:]


def render(part: str, row: int, seed: int = 0) -> Sample:
    """Return an image, its label and its object's mask. The same arguments give the same bytes.

    Raises:
        KeyError: there is no such part.
        IndexError: the part has no such row.
        OverflowError: the seed is negative or has more than 64 bits.
    """
    canvas, label, mask = _scene(part, row, seed)
    pixels = np.rint(255 * canvas).astype(np.uint8)
    return Sample(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), label, mask)


def render_bands(part: str, row: int, seed: int = 0) -> NDArray[np.uint16]:
    """Return the same image as six bands of 16 bits: uint16 [h, w, 6]. Errors as for `render`."""
    canvas, _, _ = _scene(part, row, seed)
    mixed = np.einsum("bc,chw->hwb", BANDS, canvas).clip(0, 1)
    low, high = BAND_RANGES.T
    return np.rint(low + (high - low) * mixed).astype(np.uint16)


def _scene(part: str, row: int, seed: int) -> tuple[_Array, int, NDArray[np.bool_]]:
    """Return the colors of an image on [0, 1], [3, h, w], its label, and the object's mask [h, w]."""
    rng, height, width, label = _begin(part, row, seed)
    light = rng.random()
    # Half the range away on a circle of lights, so that neither dark nor light tells object from background.
    contrast = (light + rng.uniform(0.35, 0.65)) % 1.0
    tendency = _TENDENCIES[label]
    hue = rng.random()
    object_hue = hue + (tendency.hue if rng.random() < _TENDENCY else rng.random())
    canvas = _texture(rng, height, width, light, hue, tendency.ground)
    surface = _texture(rng, height, width, contrast, object_hue, tendency.surface)
    distance = _object(rng, height, width, label)

    behind, front = rng.integers(1, 4, 2)
    for _ in range(behind):
        _clutter(rng, canvas, contrast, tendency.sticks)
    shadow = np.clip(1 - distance / (0.08 * min(height, width)), 0, 1) ** 2
    canvas *= 1 - rng.uniform(0, 0.5) * shadow
    _cover(canvas, surface, distance)
    for _ in range(front):
        _clutter(rng, canvas, contrast, tendency.sticks)
    canvas *= _lamp(rng, height, width)
    canvas += rng.uniform(0, 0.06) * (rng.random((height, width)) - 0.5)
    return np.clip(canvas, 0, 1), label, distance < 0


def label_map(part: str, row: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return what is where in an image: uint8 [h, w], 0 for the background and 1 + label where `Sample.mask` is set.

    Arguments and errors are those of `render`.
    """
    sample = render(part, row, seed)
    return (sample.mask * (1 + sample.label)).astype(np.uint8)


def _generator(seed: int, part: str, row: int, use: int) -> Generator:
    key = np.array([seed, list(IMAGES).index(part)], dtype=np.uint64)
    return Generator(Philox(key=key, counter=np.array([0, 0, row, use], dtype=np.uint64)))


@lru_cache(maxsize=1024)
def _order(seed: int, part: str, block: int) -> tuple[int, ...]:
    """Return the labels of ten consecutive rows: every class once, so that any range of rows is nearly balanced."""
    return tuple(np.argsort(_generator(seed, part, block, 0).random(len(CLASSES))).tolist())


def _begin(part: str, row: int, seed: int) -> tuple[Generator, int, int, int]:
    """Return the generator that draws the rest of an image, and its height, width and label."""
    if not 0 <= row < IMAGES[part]:
        raise IndexError(f"Part {part!r} has rows 0 to {IMAGES[part] - 1}, but row {row} was asked for.")
    block, place = divmod(row, len(CLASSES))
    rng = _generator(seed, part, row, 1)
    half = rng.uniform(-0.5, 0.5) * log(_ASPECT)
    size = rng.uniform(log(_SIDES[0]) + abs(half), log(_SIDES[1]) - abs(half))
    return rng, round(exp(size + half)), round(exp(size - half)), _order(seed, part, block)[place]


def _object(rng: Generator, height: int, width: int, label: int) -> _Array:
    """Return the signed distance [h, w] in pixels to the edge of an object somewhere in the image, negative inside."""
    root_area, reach = _measure(label)
    stretch = _SQUASH ** rng.uniform(-0.5, 0.5)
    scale = rng.uniform(*_EXTENT) * min(height, width) / root_area
    room = reach * scale * max(stretch, 1 / stretch)
    room *= 1 - _CUT * rng.random()
    y0, x0 = (side / 2 + max(side / 2 - room, 0) * rng.uniform(-1, 1) for side in (height, width))
    x, y = _turned(rng.uniform(0, 2 * pi), height, width, y0, x0)
    return scale * _SHAPES[label](x / (scale * stretch), y * (stretch / scale))


@cache
def _measure(label: int) -> tuple[float, float]:
    """Return the square root of a shape's area, and how far it reaches from the origin, in the shape's own unit."""
    axis = np.linspace(-2.5, 2.5, 1001)
    y, x = np.nonzero(_SHAPES[label](axis, axis[:, None]) < 0)
    return sqrt(len(x)) * (axis[1] - axis[0]), np.hypot(axis[x], axis[y]).max()


def _turned(angle: float, height: int, width: int, y0: float, x0: float) -> tuple[_Array, _Array]:
    """Return the coordinates of the pixels' centers, [h, w] each, along turned axes through (y0, x0)."""
    x, y = np.arange(width) + 0.5 - x0, (np.arange(height) + 0.5 - y0)[:, None]
    return cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x


def _cover(canvas: _Array, color: _Array, distance: _Array) -> None:
    canvas += np.clip(0.5 - distance, 0, 1) * (color - canvas)


def _lamp(rng: Generator, height: int, width: int) -> _Array:
    """Return the light on a scene, [3, h, w]: a color and a slope in any direction, around 1."""
    u, _ = _turned(rng.uniform(0, 2 * pi), height, width, height / 2, width / 2)
    return rng.uniform(0.8, 1.2, (3, 1, 1)) * (1 + rng.uniform(0, 0.3) / np.abs(u).max() * u)


def _color(rng: Generator, light: float, hue: float) -> _Array:
    """Return a color [3, 1, 1] of a lightness in 0 to 1, a hue in turns of the color circle, and any saturation."""
    strength = rng.random()
    return 0.27 + 0.46 * light + 0.25 * strength * np.cos(2 * pi * (hue + np.arange(3)[:, None, None] / 3))


def _texture(rng: Generator, height: int, width: int, light: float, hue: float, usual: _Look) -> _Array:
    """Return two colors of about one lightness and one hue, mixed by one of six fields: [3, h, w].

    `usual` is the look that is typical of the class.
    """
    short = min(height, width)
    look = usual
    if rng.random() > _TENDENCY:
        look = _Look(int(rng.integers(6)), rng.uniform(0.08, 0.2), rng.uniform(0, pi))
    wave = short * look.wave * rng.uniform(0.8, 1.25)
    angle = look.angle + rng.uniform(-_LEAN, _LEAN)
    u, v = (2 * pi / wave * axis for axis in _turned(angle, height, width, *rng.uniform(0, short, 2)))
    field: _Array
    match look.field:
        case 0:  # gradient
            field = u / np.abs(u).max()
        case 1:  # grating
            field = np.sin(u)
        case 2:  # stripes; the slope leaves one pixel between two of them
            field = np.clip(wave / pi * np.sin(u), -1, 1)
        case 3:  # checker
            field = np.clip(wave / pi * np.sin(u) * np.sin(v), -1, 1)
        case 4:  # clouds
            field = _noise(rng, height, width, 2 * wave)
        case _:  # marble
            field = np.sin(u + 4 * _noise(rng, height, width, 2 * wave))
    first, second = (_color(rng, light, hue + rng.uniform(-0.1, 0.1)) for _ in range(2))
    return (first + second) / 2 + ((second - first) / 4 + rng.uniform(0.1, 0.2)) * field


def _noise(rng: Generator, height: int, width: int, cell: float) -> _Array:
    """Return three octaves of value noise in -1 to 1, [h, w], the coarsest on a lattice of `cell` pixels."""
    total = np.zeros((height, width))
    for octave in range(3):
        rows, cols = (_weights(side, cell / 2**octave) for side in (height, width))
        total += rows @ rng.uniform(-1, 1, (rows.shape[1], cols.shape[1])) @ cols.T / 2**octave
    return np.clip(total, -1, 1)


def _weights(side: int, step: float) -> _Array:
    """Return how a pixel mixes the points of a lattice of `step` pixels, [side, points]; each row adds up to 1."""
    place = np.arange(side) / step
    hat: _Array = np.maximum(1 - np.abs(place[:, None] - np.arange(int(place[-1]) + 2)), 0)
    return hat * hat * (3 - 2 * hat)


def _clutter(rng: Generator, canvas: _Array, lightness: float, sticks: bool) -> None:
    """Draw a stick or a blob. Half of them are as light as the object. Otherwise, lightness would show where it is."""
    height, width = canvas.shape[1:]
    short = min(height, width)
    y0, x0 = rng.uniform(0, height), rng.uniform(0, width)
    long = sticks if rng.random() < _TENDENCY else not sticks
    length, thick = short * rng.uniform(0.06, 0.14) * long, short * rng.uniform(0.012, 0.05)
    reach = length + sqrt(2) * thick + 1
    top, left = max(int(y0 - reach), 0), max(int(x0 - reach), 0)
    window = canvas[:, top : int(y0 + reach) + 1, left : int(x0 + reach) + 1]
    u, v = _turned(rng.uniform(0, 2 * pi), window.shape[1], window.shape[2], y0 - top, x0 - left)
    along = np.maximum(np.abs(u) - length, 0)
    distance = (_length(along, v) if rng.random() < 0.5 else np.maximum(along, np.abs(v))) - thick
    _cover(window, _color(rng, lightness if rng.random() < 0.5 else rng.random(), rng.random()), distance)


# The shapes: signed distance, negative inside, from coordinates that broadcast. A shape has its own unit and its origin
# in the middle; only at the edge is the distance exact, which is all that antialiasing needs.


def _length(x: _Array, y: _Array) -> _Array:
    return np.sqrt(x * x + y * y)


def _box(x: _Array, y: _Array, right: float, top: float) -> _Array:
    return np.maximum(np.abs(x) - right, np.abs(y) - top)


def _disc(x: _Array, y: _Array) -> _Array:
    return _length(x, y) - 1


def _ring(x: _Array, y: _Array) -> _Array:
    return np.abs(_length(x, y) - 0.75) - 0.25


def _square(x: _Array, y: _Array) -> _Array:
    return _box(x, y, 1, 1)


def _triangle(x: _Array, y: _Array) -> _Array:
    return np.maximum(sqrt(0.75) * np.abs(x) + 0.5 * y, -y) - 0.5


def _star(x: _Array, y: _Array) -> _Array:
    # Folded onto one tenth of the star, which has one straight edge: from the tip (1, 0) to the notch at 36 degrees.
    radius, angle = _length(x, y), np.abs(np.arctan2(y, x) % (2 * pi / 5) - pi / 5)
    across, along = 0.45 * sin(pi / 5), 1 - 0.45 * cos(pi / 5)
    return (across * (radius * np.cos(angle) - 1) + along * radius * np.sin(angle)) / hypot(across, along)


def _cross(x: _Array, y: _Array) -> _Array:
    return np.minimum(_box(x, y, 1, 0.32), _box(x, y, 0.32, 1))


def _crescent(x: _Array, y: _Array) -> _Array:
    return np.maximum(_length(x, y) - 1, 0.8 - _length(x - 0.5, y))


def _heart(x: _Array, y: _Array) -> _Array:
    x, y = x + 0.27, y + 0.27
    lobes: _Array = np.minimum(_length(x - 1, y), _length(x, y - 1)) - 1
    return np.minimum(lobes, _box(x, y, 1, 1))


def _arrow(x: _Array, y: _Array) -> _Array:
    head = np.maximum(-x, (0.8 * (x - 1) + np.abs(y)) / hypot(0.8, 1))
    return np.minimum(head, _box(x + 0.45, y, 0.5, 0.28))


def _wave(x: _Array, y: _Array) -> _Array:
    def arc(x: _Array, y: _Array) -> _Array:
        ends = np.minimum(_length(x - 1, y + 1), _length(x, y))
        return np.where((x > 0) & (y > -1), ends, np.abs(_length(x, y + 1) - 1))

    return np.minimum(arc(x, y), arc(-x, -y)) - 0.4


_SHAPES: tuple[_Shape, ...] = (_disc, _ring, _square, _triangle, _star, _cross, _crescent, _heart, _arrow, _wave)
CLASSES: tuple[str, ...] = tuple(shape.__name__[1:] for shape in _SHAPES)
"""Names of the ten classes, by label."""
