"""Grey images of twelve textured, turned, occluded and noisy shapes, drawn by a seeded generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIZE = 32  # pixels a side
FINER = 2  # samples a pixel and side, averaged: edges are smooth
CHUNK = 500
LEVELS = 256  # images are whole multiples of 1/256, which float16 holds exactly


def draw_shapes(count: int, seed: int) -> tuple[Array, Array]:
    """Images `[count, 1, 32, 32]`, float16 in 0..1, and their classes `[count]`, int64.

    The same seed draws the same images; other seeds draw other ones.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(SHAPES), count)
    images = np.concatenate([_draw(labels[start : start + CHUNK], rng) for start in range(0, count, CHUNK)])
    levels = np.clip(np.round(images * LEVELS), 0, LEVELS - 1)
    return (levels / LEVELS).astype(np.float16)[:, None], labels


def _draw(labels: Array, rng: np.random.Generator) -> Array:
    """Images [N, 32, 32] of the classes `labels` [N]."""
    count = len(labels)
    side = (np.arange(SIZE * FINER, dtype=np.float32) + 0.5) / (SIZE * FINER) * 2 - 1
    y, x = np.broadcast_arrays(side[:, None], side[None, :])

    def uniform(low: float, high: float) -> Array:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    angle, scale, aspect = uniform(0, 2 * np.pi), uniform(0.45, 0.8), uniform(0.85, 1.18)
    left, down = x - uniform(-0.25, 0.25), y - uniform(-0.25, 0.25)
    u = (left * np.cos(angle) + down * np.sin(angle)) / scale * aspect
    v = (down * np.cos(angle) - left * np.sin(angle)) / scale / aspect
    inside = np.empty(u.shape, dtype=bool)
    for index, shape in enumerate(SHAPES.values()):
        mine = labels == index
        inside[mine] = shape(u[mine], v[mine])

    level = uniform(0.2, 0.8)
    contrast = uniform(0.25, 0.5) * np.where(level > 0.5, -1, 1).astype(np.float32)
    image = np.where(
        inside,
        level + contrast + _grating(x, y, uniform, 0.15),
        level + _grating(x, y, uniform, 0.15) + uniform(-0.15, 0.15) * x + uniform(-0.15, 0.15) * y,
    )
    for _ in range(2):  # bars that hide parts
        turn, offset = uniform(0, np.pi), uniform(-0.7, 0.7)
        bar = np.abs(x * np.cos(turn) + y * np.sin(turn) - offset) < uniform(-0.08, 0.1)
        image = np.where(bar, uniform(0, 1), image)
    coarse = image.reshape(count, SIZE, FINER, SIZE, FINER).mean((2, 4))
    noise = rng.standard_normal((count, SIZE, SIZE), dtype=np.float32)
    return np.asarray(coarse + noise * uniform(0.02, 0.1))


def _grating(x: Array, y: Array, uniform: Callable[[float, float], Array], strength: float) -> Array:
    turn, waves, phase = uniform(0, np.pi), uniform(2, 7), uniform(0, 2 * np.pi)
    wave = np.sin(np.pi * waves * (x * np.cos(turn) + y * np.sin(turn)) + phase)
    return uniform(0, strength) * wave


def _polygon(corners: int) -> Callable[[Array, Array], Array]:
    half = np.pi / corners

    def inside(u: Array, v: Array) -> Array:
        turn = np.mod(np.arctan2(v, u), 2 * half) - half
        return np.asarray(np.hypot(u, v) * np.cos(turn) < np.cos(half))

    return inside


def _star(points: int, waist: float) -> Callable[[Array, Array], Array]:
    half = np.pi / points

    def inside(u: Array, v: Array) -> Array:
        turn = np.abs(np.mod(np.arctan2(v, u), 2 * half) - half)  # 0 at the waist, half at a point
        radius = np.hypot(u, v)
        along, across = radius * np.cos(half - turn), radius * np.sin(half - turn)
        # The edge runs from the point (1, 0) to the waist, at the angle `half` and the radius `waist`.
        edge_along, edge_across = waist * np.cos(half), waist * np.sin(half)
        return np.asarray(across * (1 - edge_along) < edge_across * (1 - along))

    return inside


def _crescent(u: Array, v: Array) -> Array:
    return np.asarray((np.hypot(u, v) < 1) & (np.hypot(u - 0.5, v) > 0.8))


def _ring(u: Array, v: Array) -> Array:
    return np.asarray(np.abs(np.hypot(u, v) - 0.75) < 0.25)


def _square(u: Array, v: Array) -> Array:
    return np.asarray(np.maximum(np.abs(u), np.abs(v)) < 0.8)


def _frame(u: Array, v: Array) -> Array:
    return np.asarray(np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.65) < 0.2)


def _cross(u: Array, v: Array) -> Array:
    return np.asarray((np.minimum(np.abs(u), np.abs(v)) < 0.28) & (np.maximum(np.abs(u), np.abs(v)) < 0.95))


def _corner(u: Array, v: Array) -> Array:
    return np.asarray((np.maximum(np.abs(u), np.abs(v)) < 0.85) & (np.minimum(u, v) < -0.3))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.asarray(np.hypot(u, v) < 0.9),
    "ring": _ring,
    "crescent": _crescent,
    "half disc": lambda u, v: np.asarray((np.hypot(u, v) < 1) & (u > 0)),
    "triangle": _polygon(3),
    "square": _square,
    "frame": _frame,
    "pentagon": _polygon(5),
    "star of four": _star(4, 0.4),
    "star of five": _star(5, 0.45),
    "cross": _cross,
    "corner": _corner,
}
