"""Stuff textures of the procedural scenes: surfaces that fill a region of the image.

Each painter maps (generator, side in pixels) to RGB float32 [side, side, 3] in [0, 1].
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.floating[Any]]
Painter = Callable[[np.random.Generator, int], Array]


def noise(rng: np.random.Generator, side: int, rows: int, columns: int) -> Array:
    """Smooth noise: uniform values on a rows x columns grid, resized bicubically to [side, side]."""
    grid = rng.random((rows + 1, columns + 1), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))


def axes(side: int) -> tuple[Array, Array]:
    """Column and row coordinates [1, side] and [side, 1] in [0, 1)."""
    line = np.arange(side, dtype=np.float32) / side
    return line[None, :], line[:, None]


def rotated(rng: np.random.Generator, side: int, spread: float) -> tuple[Array, Array]:
    """Coordinates [side, side] turned by up to `spread` radians."""
    x, y = axes(side)
    angle = rng.uniform(-spread, spread)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    return u.astype(np.float32), v.astype(np.float32)


def tint(rng: np.random.Generator, rgb: tuple[float, float, float], spread: float = 0.06) -> Array:
    """Return a base colour [3] moved by up to `spread` per channel."""
    return (np.array(rgb) + rng.uniform(-spread, spread, 3)).astype(np.float32)


def blend(first: Array, second: Array, weight: Array) -> Array:
    """Mix colours [3] or images [h, w, 3] by `weight` [h, w] (0 is all first)."""
    return first + (second - first) * weight[..., None]


def grass(rng: np.random.Generator, side: int) -> Array:
    """Upright blades in two greens over soft patches."""
    blades = noise(rng, side, side // int(rng.integers(7, 12)), side // 2)
    patches = noise(rng, side, 5, 5)
    green = blend(tint(rng, (0.16, 0.36, 0.10)), tint(rng, (0.45, 0.66, 0.22)), blades)
    return green * (0.75 + 0.5 * patches[..., None])


def brick_wall(rng: np.random.Generator, side: int) -> Array:
    """Running bond with mortar; every brick its own shade."""
    u, v = rotated(rng, side, 0.12)
    rows = float(rng.uniform(9, 15))
    row = np.floor(v * rows)
    across = u * rows / 2.2 + 0.5 * (row % 2)
    column = np.floor(across)
    shade = rng.random(4096, dtype=np.float32)[((row * 71 + column * 37) % 4096).astype(np.int64)]
    face = blend(tint(rng, (0.52, 0.20, 0.14)), tint(rng, (0.72, 0.36, 0.24)), shade)
    mortar = (v * rows - row < 0.14) | (across - column < 0.07)
    wall = np.where(mortar[..., None], tint(rng, (0.74, 0.71, 0.66)), face)
    return np.asarray(wall + 0.10 * (noise(rng, side, side // 2, side // 2)[..., None] - 0.5), dtype=np.float32)


def water(rng: np.random.Generator, side: int) -> Array:
    """Horizontal ripples bent by slow noise, with glints."""
    _, v = rotated(rng, side, 0.15)
    bend = noise(rng, side, 9, 5)
    waves = 0.5 + 0.5 * np.sin(2 * np.pi * (v * rng.uniform(10, 18) + 2.2 * bend)).astype(np.float32)
    base = blend(
        tint(rng, (0.05, 0.25, 0.48)), tint(rng, (0.22, 0.56, 0.74)), waves * noise(rng, side, 20, 8) * 1.4
    )
    glints = np.clip((waves * noise(rng, side, side // 4, side // 12) - 0.62) * 6, 0, 1)
    return blend(base, np.ones(3, np.float32), 0.7 * glints)


def sand(rng: np.random.Generator, side: int) -> Array:
    """Fine grain over faint wind ridges."""
    u, v = rotated(rng, side, 0.9)
    ridges = 0.5 + 0.5 * np.sin(2 * np.pi * (v * rng.uniform(5, 9) + noise(rng, side, 4, 4) + 0 * u))
    grain = rng.random((side, side), dtype=np.float32)
    level = (0.45 * ridges + 0.25 * noise(rng, side, 6, 6) + 0.45 * grain).astype(np.float32)
    return blend(tint(rng, (0.66, 0.53, 0.35)), tint(rng, (0.94, 0.85, 0.64)), level)


def wooden_floor(rng: np.random.Generator, side: int) -> Array:
    """Planks with stretched grain and dark joints."""
    u, v = rotated(rng, side, 0.2)
    if rng.random() < 0.5:
        u, v = v, u
    planks = float(rng.uniform(5, 9))
    plank = np.floor(v * planks)
    shade = rng.random(64, dtype=np.float32)[(plank % 64).astype(np.int64)]
    grain = 0.5 + 0.5 * np.sin(2 * np.pi * (v * planks * 3.1 + shade * 7 + 1.5 * noise(rng, side, 8, 8)))
    wood = blend(
        tint(rng, (0.36, 0.21, 0.10)),
        tint(rng, (0.66, 0.44, 0.24)),
        (0.5 * shade + 0.5 * grain).astype(np.float32),
    )
    offset = u * 2.1 + shade * 3.7
    joint = (v * planks - plank < 0.06) | (offset - np.floor(offset) < 0.015)
    return np.asarray(np.where(joint[..., None], np.float32(0.14), wood), dtype=np.float32)


def cobblestones(rng: np.random.Generator, side: int) -> Array:
    """Grey stones: cells around jittered points, dark between them, lighter in the middle."""
    cells = int(rng.integers(8, 13))
    x, y = axes(side)
    u, v = x * cells + 0 * y, y * cells + 0 * x
    offsets = rng.uniform(0.15, 0.85, (cells + 2, cells + 2, 2)).astype(np.float32)
    shades = rng.random((cells + 2, cells + 2), dtype=np.float32)
    nearest, second, shade = (np.full((side, side), 9.0, np.float32) for _ in range(3))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            j, i = np.floor(v).astype(int) + dy, np.floor(u).astype(int) + dx
            distance = np.hypot(u - i - offsets[j, i, 0], v - j - offsets[j, i, 1])
            shade = np.where(distance < nearest, shades[j, i], shade)
            second = np.minimum(second, np.maximum(distance, nearest))
            nearest = np.minimum(nearest, distance)
    stone = blend(tint(rng, (0.36, 0.36, 0.39)), tint(rng, (0.66, 0.65, 0.64)), shade)
    stone = stone * (1.15 - 0.55 * nearest[..., None])
    gap = np.clip((0.16 - (second - nearest)) * 9, 0, 1).astype(np.float32)
    return blend(stone, tint(rng, (0.16, 0.15, 0.14), 0.04), gap)


STUFF: dict[str, Painter] = {
    "grass": grass,
    "brick wall": brick_wall,
    "water": water,
    "sand": sand,
    "wooden floor": wooden_floor,
    "cobblestones": cobblestones,
}
