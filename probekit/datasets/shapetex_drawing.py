"""Shapes filled with textures, in integers only: the same pixels on every machine and numpy.

Everything is on a square of `SPAN` x `SPAN` units, so that a scene is the same at every image size, its
noise apart. Angles are 256ths of a turn. A pixel is the mean of 2 x 2 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

SPAN = 1 << 14
ONE = 1024  # the unit of a shape's own coordinates: about half its width
PERIOD = 256  # the unit of a texture's own coordinates

# Rounded to 14 bits; none of the 256 is so near the middle of two integers that a cosine's last bit decides.
COSINE = [round(SPAN * math.cos(math.tau * k / 256)) for k in range(256)]

Map = np.ndarray  # (points, points) bool


def cosine(angle: int) -> int:
    return COSINE[angle % 256]


def sine(angle: int) -> int:
    return COSINE[(angle - 64) % 256]


@cache
def points(count: int) -> np.ndarray:
    """Coordinates of `count` evenly spaced points on one axis, the scene's middle being 0."""
    return (2 * np.arange(count) + 1) * SPAN // (2 * count) - SPAN // 2


def plane(count: int, unit: int, length: int, angle: int, origin: tuple[int, int]) -> np.ndarray:
    """(count, count) int32: how far along direction `angle` from `origin`, `unit` numbers a `length`."""
    across, down = ((f(angle) * unit << 2) // length for f in (cosine, sine))  # with 16 fractional bits
    axis = points(count)
    columns = (across * (axis - origin[0])).astype(np.int32)
    rows = (down * (axis - origin[1])).astype(np.int32)
    return np.add(columns[None, :], rows[:, None]) >> 16


# --- shapes: (u, v) with `ONE` as unit, v downwards -> inside or not ---------------------------------------


def _circle(u: np.ndarray, v: np.ndarray) -> Map:
    return u * u + v * v < 920**2


def _square(u: np.ndarray, v: np.ndarray) -> Map:
    return np.maximum(np.abs(u), np.abs(v)) < 810


def _triangle(u: np.ndarray, v: np.ndarray) -> Map:
    # equilateral, point up; 887 / 512 is the root of 3
    return (v < 600) & (887 * np.abs(u) < 512 * (v + 1200))


def _star(u: np.ndarray, v: np.ndarray) -> Map:
    # a pentagram is where at least four of the pentagon's five edges have the point on their inner side
    inner = [((cosine(a) * u + sine(a) * v) >> 14) < 480 for a in (64, 115, 166, 218, 13)]
    return sum(side.view(np.uint8) for side in inner) >= 4


def _cross(u: np.ndarray, v: np.ndarray) -> Map:
    u, v = np.abs(u), np.abs(v)
    return (np.maximum(u, v) < 1050) & (np.minimum(u, v) < 390)


def _ring(u: np.ndarray, v: np.ndarray) -> Map:
    square = u * u + v * v
    return (square < 1050**2) & (square > 520**2)


def _crescent(u: np.ndarray, v: np.ndarray) -> Map:
    moon = u + 160
    shade = moon - 560
    v = v * v
    return (moon * moon + v < 1100**2) & (shade * shade + v > 880**2)


def _heart(u: np.ndarray, v: np.ndarray) -> Map:
    # a square on its corner with a half disc on each of its two upper sides
    v = v - 100
    p, q = u - v, -u - v  # along the sides, stretched by the root of 2
    right, left = p - 780, q - 780
    within = np.maximum(np.abs(p), np.abs(q)) < 780
    return within | (right * right + q * q < 780**2) | (left * left + p * p < 780**2)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], Map]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
}


# --- textures: (s, t) with `PERIOD` as unit, random bytes -> first or second tone ---------------------------


def _stripes(s: np.ndarray, t: np.ndarray, _: np.ndarray) -> Map:
    return s & 128 != 0


def _checks(s: np.ndarray, t: np.ndarray, _: np.ndarray) -> Map:
    return (s ^ t) & 128 != 0


def _dots(s: np.ndarray, t: np.ndarray, _: np.ndarray) -> Map:
    s, t = (s & 255) - 128, (t & 255) - 128
    return s * s + t * t < 84**2


def _zigzag(s: np.ndarray, t: np.ndarray, _: np.ndarray) -> Map:
    return s + np.abs((t & 511) - 256) & 128 != 0


def _grid(s: np.ndarray, t: np.ndarray, _: np.ndarray) -> Map:
    return np.minimum(s & 255, t & 255) < 64


def _bricks(s: np.ndarray, t: np.ndarray, _: np.ndarray) -> Map:
    row = t // 192
    shifted = s + (row & 1) * 256  # every other row by half a brick
    return np.minimum(shifted & 511, t - 192 * row) < 60


def _speckle(s: np.ndarray, t: np.ndarray, noise: np.ndarray) -> Map:
    return noise[:4096].take((s >> 6 & 63) | (t & 63 << 6)) & 1 != 0


def _patches(s: np.ndarray, t: np.ndarray, noise: np.ndarray) -> Map:
    # Cells of random height, blurred by linear splines. A product of matrices of small whole numbers is exact
    # in float64, in whatever order they are added. It doesn't turn with the texture: it has no direction.
    cells = 12
    spline = _spline(len(s), cells)
    lattice = noise[: cells * cells].reshape(cells, cells).astype(np.float64)
    heights = spline @ lattice @ spline.T
    return heights > int(noise[: cells * cells].sum(dtype=np.int64)) * 256**2 // cells**2


@cache
def _spline(count: int, cells: int) -> np.ndarray:
    """(count, cells) weights of linear interpolation between `cells` values, each row adding up to 256."""
    place = np.arange(count) * ((cells - 1) * 256) // count
    distance = np.abs(place[:, None] - 256 * np.arange(cells)[None, :])
    return np.maximum(256 - distance, 0).astype(np.float64)


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Map]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "zigzag": _zigzag,
    "grid": _grid,
    "bricks": _bricks,
    "speckle": _speckle,
    "patches": _patches,
}

_SHAPES = tuple(SHAPES.values())
_TEXTURES = tuple(TEXTURES.values())


def draw(bits: np.random.Philox, size: int, shape: int, texture: int) -> np.ndarray:
    """(size, size, 3) uint8: the shape filled with the texture; all else is drawn from `bits`."""
    return _Scene(bits).pixels(size, shape, texture)


def figure(bits: np.random.Philox, size: int, shape: int) -> np.ndarray:
    """(size, size) bool: the pixels more than half covered by the shape that `draw` draws."""
    return _count(_Scene(bits).inside(size, shape)) > 2


class _Scene:
    """Where things are and what they look like; the order in which it is drawn is part of the pixels."""

    def __init__(self, bits: np.random.Philox):
        self.bits = bits
        self.draws = iter(bits.random_raw(32).tolist())
        self.radius = self._between(27, 38) * SPAN // 100
        room = (SPAN - 2 * self.radius) // 2  # a star's points may leave the image, little else
        self.middle = self._between(-room, room), self._between(-room, room)
        self.angle = self._between(-22, 22)  # 31 degrees either way

    def _between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + next(self.draws) % (high - low + 1)

    def inside(self, size: int, shape: int) -> np.ndarray:
        """(2 size, 2 size) bool: the points inside the shape."""
        u, v = (plane(2 * size, ONE, self.radius, a, self.middle) for a in (self.angle, self.angle + 64))
        return _SHAPES[shape](u, v)

    def pixels(self, size: int, shape: int, texture: int) -> np.ndarray:
        inside = self.inside(size, shape)
        second = _count(inside & self._texture(2 * size, texture))
        first = _count(inside) - second
        # which of ground, first and second tone is the darkest, which the lightest
        order = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))[self._between(0, 5)]
        lumas = [self._between(low, low + 45) for low in (20, 105, 190)]
        ground, one, two = (self._colour(lumas[k]) for k in order)
        image = (4 - first - second) * self._background(size, ground) + first * one + second * two
        image = (image + 2 >> 2) + self._noise(size)
        return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def _texture(self, count: int, texture: int) -> np.ndarray:
        """(count, count) bool, with a period of 10 to 15 % of the image, at any angle and place."""
        period = self._between(10, 15) * SPAN // 100
        angle = self._between(0, 255)
        origin = self._between(-SPAN, SPAN), self._between(-SPAN, SPAN)
        s, t = (plane(count, PERIOD, period, a, origin) for a in (angle, angle + 64))
        return _TEXTURES[texture](s, t, self._bytes(4096))

    def _colour(self, luma: int) -> np.ndarray:
        """(3, 1, 1) int16: a colour of this luma, within 8 bits."""
        blue, red = self._between(-44, 44), self._between(-44, 44)
        rgb = luma + (359 * red >> 8), luma - (88 * blue + 183 * red >> 8), luma + (454 * blue >> 8)
        return np.array(rgb).clip(0, 255).astype(np.int16)[:, None, None]

    def _background(self, size: int, colour: np.ndarray) -> np.ndarray:
        """(3, size, size) int16: a gradient to a near colour, and on one in four a faint texture."""
        shift = np.array([self._between(-28, 28) for _ in range(3)], np.int32)[:, None, None]
        along = plane(size, 256, SPAN, self._between(0, 255), (0, 0))
        ground = colour + (shift * along >> 8).astype(np.int16)
        if self._between(0, 3):
            return ground
        strength = self._between(4, 14)
        faint = self._texture(size, self._between(0, len(_TEXTURES) - 1))
        return ground + faint.astype(np.int16) * strength

    def _noise(self, size: int) -> np.ndarray:
        """(size, size) int16: white and weak, the same in the three colours."""
        strength = self._between(1, 8)
        raw = self._bytes(size * size).reshape(size, size).astype(np.int16)
        return (raw * (2 * strength + 1) >> 8) - strength

    def _bytes(self, count: int) -> np.ndarray:
        return self.bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def _count(inside: np.ndarray) -> np.ndarray:
    """(n, n) int16: how many of each 2 x 2 points of a (2n, 2n) bool map."""
    ones = inside.view(np.uint8)
    columns = ones[0::2] + ones[1::2]
    return (columns[:, 0::2] + columns[:, 1::2]).astype(np.int16)
